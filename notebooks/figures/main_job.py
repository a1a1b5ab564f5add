r"""The main job on both denoisers of the zoo: time, what was measured, and whether a killed run
ends with the same plan.

    python notebooks/figures/main_job.py [--kills 3] [--models scenes-dit scenes-unet] [--name NAME]

Each config runs into a new folder in a process of its own; then again (what has not changed is
skipped); then, with kills, into another folder with SIGKILL after random delays. Seconds are by the
clock, and of the processor, which tell what the job takes where the machine does other work too.
Writes main_job.json beside this file, main_job-NAME.json where a name is given (`--models
scenes-video --name video`).

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 \
        python notebooks/figures/main_job.py

is the job on two cores with AVX2 alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from figure import publish

from qsearch.report.tables import difference

ROOT = Path(__file__).parents[2]
NAMES = ("scenes-dit", "scenes-unet")
MODELS = (*NAMES, "scenes-video")


def start(config: Path) -> subprocess.Popen[bytes]:
    """`qsearch run CONFIG` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "qsearch.cli", "run", str(config)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def processor_seconds() -> float:
    """Seconds of the processor that all processes of this one have taken and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def configured(name: str, folder: Path) -> Path:
    """The shipped config with another folder."""
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) | {
        "folder": str(folder)
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def sites(folder: Path) -> dict[str, Any]:
    """The plan's choices."""
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())["sites"]
    return plan


def differences(model: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the plan has more than the uniform one: with the error of the samples' own differences,
    and with that of two plans measured apart.
    """
    plan = next(row for row in results if row["plan"] == "plan")
    uniform = next(row for row in results if row["plan"].startswith("uniform"))
    rows = []
    for metric in plan["samples"]:
        gap, error = difference(plan, uniform, metric)
        apart = math.hypot(*(row["metrics"][metric][1] for row in (plan, uniform)))
        rows.append(
            {
                "model": model,
                "metric": metric,
                "difference": f"{gap:+.4g}",
                "± paired": f"{error:.2g}",
                "± apart": f"{apart:.2g}",
            }
        )
    return rows


def main() -> None:
    """Run, time, kill, compare, publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=MODELS)
    parser.add_argument("--name", default="", help="added to the name of the JSON")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    paired: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            folder = Path(scratch) / name
            config = configured(name, folder)
            seconds, worked = [], []
            for _ in range(2):
                began, before = time.monotonic(), processor_seconds()
                if start(config).wait() != 0:
                    raise SystemExit(f"{name}: the main job failed")
                seconds.append(time.monotonic() - began)
                worked.append(processor_seconds() - before)
            killed = Path(scratch) / f"{name}-killed"
            config, delays = configured(name, killed), []
            for _ in range(options.kills):
                process = start(config)
                delays.append(round(dice.uniform(5, 0.9 * seconds[0]), 1))
                try:
                    process.wait(delays[-1])
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                process.wait()
            same = "not tried"
            if options.kills:
                if start(config).wait() != 0:
                    raise SystemExit(f"{name}: the job did not finish after {options.kills} kills")
                same = str(sites(folder) == sites(killed))
            runs.append(
                {
                    "model": name,
                    "first run s": seconds[0],
                    "its processor s": worked[0],
                    "second run s": seconds[1],
                    "the second's processor s": worked[1],
                    "load": os.getloadavg()[1],
                    "killed after s": str(delays),
                    "same plan": same,
                }
            )
            results = json.loads((folder / "results.json").read_text())["rows"]
            paired += differences(name, results)
            for row in results:
                metrics = {
                    k: "-"
                    if k not in row["metrics"]
                    else "{:.4g} ± {:.2g}".format(*row["metrics"][k])
                    for k in COLUMNS
                    if any(k in each["metrics"] for each in results)
                }
                rows.append(
                    {
                        "model": name,
                        "plan": row["plan"],
                        "stored bits": row["average_bits"],
                        **metrics,
                    }
                )
    script = str(Path(__file__).with_name(f"main_job{'-' * bool(options.name)}{options.name}.py"))
    publish(script, runs, title="the main job on this machine", seed=options.seed)
    publish(script, paired, title="plan minus uniform", seed=options.seed)
    publish(
        script,
        rows,
        title="measured with common noise",
        seed=options.seed,
        extra={"runs": runs, "plan minus uniform": paired},
    )


COLUMNS = ("output_sqnr", "sqnr", "ssim", "frechet", "alignment", "temporal", "motion")

if __name__ == "__main__":
    main()
