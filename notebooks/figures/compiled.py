"""Every Triton kernel as machine code for compute capability 9.0: tensor-core instructions, registers, spills, shared memory. Needs no GPU.

    python notebooks/figures/compiled.py [--only linear_a8 conv2d_a8]

One row for each kernel and tile at a shape of a real denoiser (`qsearch_kernels/gpu/specimens.py`), and its time at best on an H200: operations over the best
rates seen there (1160 TOPS int8, 1085 TFLOPS fp8, 763 TFLOPS bf16) and bytes over 4.055 TB/s, the larger of the two (gau-nernst's gn-kernels, README). Writes compiled.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from figure import publish

from qsearch_kernels import gpu_bench
from qsearch_kernels.gpu import inspection, specimens

parser = argparse.ArgumentParser()
parser.add_argument(
    "--only",
    nargs="*",
    default=[""],
    help="specimens whose names begin so; the rows of others that compiled.json has are kept",
)
options = parser.parse_args()
path = Path(__file__).with_suffix(".json")
kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
rows = []
for name in specimens.names():
    if not name.startswith(tuple(options.only)):
        rows += [row for row in kept if row["specimen"] == name]
        continue
    made = specimens.specimen(name)
    for launch in made.launches:
        found = inspection.inspect(launch)
        rows.append(
            {
                "specimen": name,
                "kernel": found.name,
                "tensor cores": ", ".join(
                    f"{count} {word}" for word, count in found.tensor_cores.items()
                ),
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
        )
        print(rows[-1], flush=True)
publish(__file__, rows, title="compiled: Triton kernels as machine code for Hopper", seed=0)
