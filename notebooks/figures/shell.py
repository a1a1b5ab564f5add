"""Tiny pipelines through every verb of the command line: Wan 2.2, which has two denoisers, and
Z-Image, whose latents are lists.

    PYTHONPATH=. python notebooks/figures/shell.py [--pipelines wan_22 z_image]

Each pipeline has its true diffusers class and random weights, and is read from a folder. A row is a
command: what it returned, and its last line. Writes shell.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figure import publish

SIZES = {
    "wan_22": {"height": 16, "width": 16, "num_frames": 5},
    "z_image": {"height": 32, "width": 32},
}


PROMPTS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue")]
PROMPTS += [p.replace("circle", "square") for p in PROMPTS]


def commands(run: str) -> dict[str, list[str]]:
    """Verb -> arguments, in the order in which they are given."""
    return {
        "profile": ["profile", run, "--schemes", "int4-c+a8,int8-c+a8", "--probes", "4"],
        "allocate": ["allocate", run, "--average-bits", "6.5"],
        "evaluate": ["evaluate", run, "--samples", "3"],
        "apply": ["apply", run],
        "export to gguf": ["export", run, "--to", "gguf", "--nearest"],
        "export to sdnq": ["export", run, "--to", "sdnq", "--nearest"],
        "show": ["show", f"{run}/plan.json"],
    }


def main() -> None:
    """Walk and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipelines", nargs="+", default=list(SIZES))
    options = parser.parse_args()
    from tests.tiny_pipelines import build

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.pipelines:
            model, run = Path(folder) / name, Path(folder) / f"run-{name}"
            build(name).save_pretrained(model)
            run.mkdir()
            (run / "prompts.txt").write_text("".join(f"{p}\n" for p in PROMPTS))
            (run / "config.yaml").write_text(
                f"model: {model}\nprompts: prompts.txt\nsampling:\n  steps: 8\n  call: "
                f"{SIZES[name]}\n"
                "profile: {bins: 2, samples: 2}\nevaluate: {metrics: [sqnr]}\n"
            )
            for verb, arguments in commands(str(run)).items():
                done = subprocess.run(
                    [sys.executable, "-m", "qsearch.cli", *arguments],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                said = (done.stdout.strip() or done.stderr.strip() or "-").splitlines()[-1]
                if done.returncode:
                    said = done.stderr.strip().splitlines()[-1]
                rows.append(
                    {
                        "pipeline": name,
                        "command": verb,
                        "exit": done.returncode,
                        "last line": said.replace(folder, "."),
                    }
                )
    publish(__file__, rows, title="Every verb from the shell", seed=4)


if __name__ == "__main__":
    main()
