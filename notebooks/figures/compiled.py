"""Every Triton kernel as machine code for a compute capability: tensor-core instructions,
registers, spills, shared memory. Needs no GPU.

    python notebooks/figures/compiled.py [--only linear_a8 conv2d_a8] [--arch 80 89 90 100 120]

One row for each kernel and tile at a shape of a real denoiser (`qsearch_kernels/gpu/specimens.py`),
and its time at best on an H200: operations over the best rates seen there (1160 TOPS int8, 1085
TFLOPS fp8, 763 TFLOPS bf16) and bytes over 4.055 TB/s, the larger of the two (gau-nernst's
gn-kernels, README). Writes compiled.json for 90, an H200's; for others compiled-ARCH.json, with
what could not be compiled and why.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from figure import publish

from qsearch_kernels import gpu_bench
from qsearch_kernels.gpu import inspection, specimens
from qsearch_kernels.gpu.launching import Launch

parser = argparse.ArgumentParser()
parser.add_argument(
    "--only",
    nargs="*",
    default=[""],
    help="specimens whose names begin so; the rows of others that compiled.json has are kept",
)
parser.add_argument("--arch", nargs="*", type=int, default=[inspection.HOPPER])
options = parser.parse_args()


def compiled(made: specimens.Specimen, launch: Launch, arch: int) -> dict[str, Any]:
    """One row: what a launch becomes, or why it becomes nothing."""
    row: dict[str, Any] = {"specimen": made.name, "kernel": launch.kernel.__name__}
    try:
        found = inspection.inspect(launch, arch)
    except Exception as error:  # of Triton or ptxas, whichever says that a card can't
        lines = [line for line in str(error).splitlines() if line.strip()]
        return row | {"tensor cores": f"refused: {(lines or [type(error).__name__])[-1][:120]}"}
    units = {word: count for word, count in found.instructions.items() if "MMA" in word}
    return row | {
        "tensor cores": ", ".join(f"{count} {word}" for word, count in units.items()),
        "descriptors": found.instructions["UTMALDG"],
        "instructions": sum(found.instructions.values()),
        "registers": found.registers,
        "spills": found.spills,
        "stack": found.stack,
        "shared KB": found.shared / 1024,
        "warps": launch.warps,
        "programs": launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1),
        "µs at best": gpu_bench.floor(made) * 1e6,
    }


for arch in options.arch:
    name = "compiled" if arch == inspection.HOPPER else f"compiled-{arch}"
    path = Path(__file__).with_name(f"{name}.json")
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = []
    for specimen in specimens.names():
        if not specimen.startswith(tuple(options.only)):
            rows += [row for row in kept if row["specimen"] == specimen]
            continue
        made = specimens.specimen(specimen)
        for launch in made.launches:
            rows.append(compiled(made, launch, arch))
            print(rows[-1], flush=True)
    title = f"compiled: Triton kernels as machine code for compute capability {arch / 10}"
    publish(str(path.with_suffix(".py")), rows, title=title, seed=0)
