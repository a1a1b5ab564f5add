"""What a user of the installed package does first, far from the source tree: `python wheel_walk.py
ENVIRONMENT`; run by tests/wheel.sh.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CONFIG = """
model: scenes-dit
folder: runs/scenes-dit
sampling: {steps: 2, batch: 3}
profile: {schemes: [uint4-c, uint8-c], samples: 2, batch: 1, bins: 1, probes: 2}
allocate: {average_bits: 5.0}
evaluate: {samples: 3, metrics: [sqnr]}
"""
#: kind -> a name that `qsearch list` must know
LISTED = {
    "models": "sdxl",
    "devices": "rtx4090",
    "methods": "mixdq-w8a8",
    "exporters": "sdnq",
    "solvers": "ilp",
    "metrics": "ssim",
}


def qsearch(*words: str) -> str:
    """A command's standard output; it must end with 0."""
    done = subprocess.run(["qsearch", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"qsearch {' '.join(words)}: {done.stderr}"
    return done.stdout


def main(environment: Path) -> None:
    """Walk, and say what was seen."""
    import qsearch as package

    where = Path(package.__file__)
    assert environment.resolve() in where.resolve().parents, where
    files = {str(f).replace("\\", "/") for f in metadata.files("qsearch-diffusion") or []}
    for wanted in (
        "qsearch/py.typed",
        "qsearch_kernels/py.typed",
        "qsearch/configs/methods/mixdq-w8a8.yaml",
    ):
        assert wanted in files, f"{wanted} is not in the wheel"
    assert any(f.endswith("licenses/LICENSE") for f in files), "no licence in the wheel"
    for kind, name in LISTED.items():
        assert name in qsearch("list", kind), f"{name} is not among the {kind}"
    Path("small.yaml").write_text(CONFIG, encoding="utf-8")
    qsearch("run", "small.yaml")
    assert Path("runs/scenes-dit/report.html").is_file()
    plan = json.loads(Path("runs/scenes-dit/plan.json").read_text(encoding="utf-8"))
    assert plan["achieved"]["average_bits"] <= 5.0
    qsearch("export", "runs/scenes-dit", "--to", "sdnq", "--nearest")
    qsearch("extract", "pixart-alpha", "--output", "runs/pixart")
    from qsearch.stages.config import load

    assert load(Path("configs/methods/mixdq-w8a8.yaml")).model == "scenes-unet"
    assert load(Path("configs/scenes-dit.yaml")).allocate.average_bits == 4.0
    print(f"walked: list, run, export, extract from {where.parent}, {len(files)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
