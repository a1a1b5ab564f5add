"""`python notebooks/figures/exports.py [parity|memory]`: what tools make of our exports beside
`simulate`, and how much memory an export takes.

Parity: the zoo in fp32, a plan with every format that the tool has in turn, one recorded call. Tool
    against `simulate`, and `simulate` against full
precision, as relative noise power of the denoiser's output. Memory: pixart-alpha's architecture
with random bf16 weights in shards; a child process warms up on the zoo, sets its peak back to what
it holds (clear_refs), and exports; the peak above that is what counts. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")

import torch
from figure import publish

from qsearch import Plan, zoo
from qsearch.execute.contracts import graph_of
from qsearch.execute.exports import export
from qsearch.measure.shards import Weights, key
from tests.execute.exporting import compare, full, plan_for

SCHEMES = [
    "int4-g32",
    "uint4-c",
    "int8-c",
    "e4m3-c",
    "keep",
    "uint5-g32@hqq",
    "uint3-c",
    "int8-g32",
    "uint8-c",
    "int6-c",
]
MIB = 2**20


def load(to: str, folder: Path, model: Any) -> Any:
    """The exported denoiser, loaded by its tool."""
    if to == "gguf":
        from diffusers import GGUFQuantizationConfig

        config = GGUFQuantizationConfig(compute_dtype=torch.float32)
        return type(model).from_single_file(
            str(folder / "model.gguf"),
            config=str(folder),
            quantization_config=config,
            torch_dtype=torch.float32,
        )
    if to == "quanto":
        from optimum.quanto.models import QuantizedPixArtTransformer2DModel

        return QuantizedPixArtTransformer2DModel.from_pretrained(folder)._wrapped
    if to == "sdnq":
        import sdnq  # noqa: F401
    return type(model).from_pretrained(folder, torch_dtype=torch.float32)


def parity() -> list[dict[str, Any]]:
    """A row for each tool and model."""
    rows = []
    pairs = [
        ("torchao", "scenes-dit"),
        ("quanto", "scenes-dit"),
        ("sdnq", "scenes-dit"),
        ("sdnq", "scenes-unet"),
        ("torchao", "scenes-unet"),
        ("gguf", "scenes-unet"),
    ]
    for to, name in pairs:
        model, graph, source, call = full(name)
        plan = plan_for(to, graph, SCHEMES)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "out"
            export(plan, graph, source, to, folder)
            error, damage = compare(load(to, folder, model), model, plan, graph, call)
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        used = sorted({str(s) for s in plan.layers.values()})
        bits = plan.achieved.average_bits
        rows.append(
            {
                "tool": to,
                "model": name,
                "tool vs simulate": error,
                "simulate vs full": damage,
                "bits": bits,
                "file MiB": size / MIB,
                "formats": " ".join(used),
            }
        )
    return rows


def make_pixart(folder: Path, shard: str) -> None:
    """pixart-alpha with random weights in bf16, in shards, as the transformer of a pipeline's
    folder.
    """
    from diffusers import PixArtTransformer2DModel

    from qsearch.graphs.families import cards

    torch.manual_seed(0)
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**cards.card("pixart-alpha").config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        tile = torch.randn(2**20).mul(0.02).bfloat16()
        for tensor in (
            model.state_dict().values()
        ):  # the same million numbers again and again: what is measured is memory
            for part in tensor.view(-1).split(len(tile)):
                part.copy_(tile[: len(part)])
    model.save_pretrained(folder / "transformer", max_shard_size=shard)


def peak(to: str, source: Path) -> dict[str, float]:
    """What an export of `source` takes above what the process holds after a first one, in MiB. Runs
    in a process of its own.
    """
    small = zoo.folder("scenes-dit")
    # Kept layers fill the shards, quantized ones need room to be quantized in: both, and the
    # largest layer among the quantized.
    schemes = {
        "torchao": ["uint4-g64", "keep", "keep", "int8-c", "keep"],
        "gguf": ["uint4-g32", "keep", "keep", "int8-g32", "keep"],
    }[to]
    with tempfile.TemporaryDirectory() as place:
        graph = graph_of(small)
        export(plan_for(to, graph, schemes), graph, small, to, Path(place) / "warm")
        graph = graph_of(source)
        plan: Plan = plan_for(to, graph, schemes)
        largest = max(graph, key=lambda layer: layer.weights)
        plan = Plan.make(graph, {**plan.layers, largest.name: schemes[0]})
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        export(plan, graph, source, to, Path(place) / "out")
        return {"before": before, "peak": _status("VmHWM") - before}


def _status(field: str) -> float:
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    ]
    return int(line.split()[1]) / 1024


def memory() -> list[dict[str, Any]]:
    """A row for each tool."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "pixart-alpha"
        subprocess.run([sys.executable, __file__, "make", str(source)], check=True)
        weights = Weights(source / "transformer")
        shard = max(p.stat().st_size for p in set(weights.files.values())) / MIB
        layer = max(2 * x.weights for x in graph_of(source)) / MIB
        whole = sum(p.stat().st_size for p in set(weights.files.values())) / MIB
        assert all(key(x) in weights.files for x in graph_of(source))
        for to in ("torchao", "gguf"):
            done = subprocess.run(
                [sys.executable, __file__, "peak", to, str(source)],
                check=True,
                capture_output=True,
                text=True,
            )
            made = json.loads(done.stdout.strip().splitlines()[-1])
            limit = shard + layer
            rows.append(
                {
                    "tool": to,
                    "model MiB": whole,
                    "shard MiB": shard,
                    "layer MiB": layer,
                    "peak MiB": made["peak"],
                    "limit MiB": limit,
                    "kept": made["peak"] <= limit,
                }
            )
    return rows


def main() -> None:
    """The parts that are asked for; numbers of the others stay as they are in exports.json."""
    if sys.argv[1:2] == ["make"]:
        return make_pixart(Path(sys.argv[2]), "300MB")
    if sys.argv[1:2] == ["peak"]:
        print(json.dumps(peak(sys.argv[2], Path(sys.argv[3]))))
        return None
    asked = sys.argv[1:] or ["parity", "memory"]
    new = {
        "rows": parity() if "parity" in asked else [],
        "memory": memory() if "memory" in asked else [],
    }
    path = Path(__file__).with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    made = {part: new[part] or known.get(part, []) for part in new}
    print(json.dumps(made["memory"], indent=2))
    publish(
        __file__,
        made["rows"] or made["memory"],
        title="tools beside simulate",
        seed=0,
        extra={"memory": made["memory"]},
    )
    return None


if __name__ == "__main__":
    main()
