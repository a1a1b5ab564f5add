"""Examples: two for every command, in the order of work, shown at the end of its `--help`."""

from __future__ import annotations

#: command -> examples; "" is `qsearch` itself
EXAMPLES: dict[str, tuple[str, str]] = {
    "init": (
        "qsearch init models/my-sdxl",
        "qsearch init models/my-flux --for gguf -o flux.yaml",
    ),
    "run": ("qsearch run my-sdxl.yaml", "qsearch run runs/my-sdxl --samples 16"),
    "extract": (
        "qsearch extract models/my-sdxl -o runs/my-sdxl",
        "qsearch extract sdxl -o runs/card --height 512 --width 512",
    ),
    "profile": (
        "qsearch profile models/my-sdxl --prompts prompts.txt",
        "qsearch profile runs/my-sdxl --schemes uint4-c,uint8-c --probes 12",
    ),
    "allocate": (
        "qsearch allocate runs/my-sdxl --average-bits 4.5",
        "qsearch allocate runs/my-sdxl --for gguf --frontier",
    ),
    "evaluate": (
        "qsearch evaluate runs/my-sdxl --samples 16",
        "qsearch evaluate runs/my-sdxl --plans 64 --workers 2",
    ),
    "report": ("qsearch report runs/my-sdxl", "qsearch report runs/my-flux"),
    "fit": ("qsearch fit runs/my-sdxl", "qsearch fit runs/a --also runs/b --surrogate ridge"),
    "explain": (
        "qsearch explain runs/my-sdxl --top 20",
        "qsearch explain runs/my-sdxl --baseline uint4-c",
    ),
    "apply": ("qsearch apply runs/my-sdxl", "qsearch apply runs/my-sdxl --required"),
    "export": (
        "qsearch export runs/my-sdxl --to torchao",
        "qsearch export runs/my-sdxl --to gguf --nearest -v",
    ),
    "import": (
        "qsearch import quantized/ runs/my-sdxl --from torchao",
        "qsearch import model.gguf runs/my-flux --force",
    ),
    "bench": ("qsearch bench runs/my-sdxl", "qsearch bench pixart-alpha --whole"),
    "show": ("qsearch show runs/my-sdxl", "qsearch show runs/my-sdxl/plan.json --why conv_out"),
    "set": (
        "qsearch set runs/my-sdxl allocate.average_bits=3.5",
        "qsearch set runs/my-sdxl sampling.steps=",
    ),
    "list": ("qsearch list exporters", "qsearch list schemes --for gguf"),
    "doctor": ("qsearch doctor", "qsearch doctor | grep memory"),
    "": ("qsearch init models/my-sdxl", "qsearch run my-sdxl.yaml"),
}
