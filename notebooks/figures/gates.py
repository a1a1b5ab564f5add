"""A server's gate on the zoo by config alone: plans that pass and fail, and the smallest that
passes.

    python notebooks/figures/gates.py [--models scenes-dit scenes-unet] [--folder runs/gates]

The protocol is vllm-gate's, one prompt with seeds 42 to 46 in 20 steps, at the zoo's 64 px, with
limits on SSIM of the pictures and on SQNR of the final latents instead of LPIPS, whose weights are
a download. For each gate `qsearch run` of a config with that gate, at three budgets: its exit code
(0 passes, 3 fails) beside what was measured; then `qsearch allocate RUN --passing`: plans that it
measured, the stored bits of the smallest that passes, and `frontier`: stored bits of the smallest
plan of `qsearch allocate --frontier` that is predicted to pass, by a line through the three runs:
of SQNR, or of the logarithm of 1 - SSIM, over the output SQNR that the prices say. Writes
gates.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from figure import publish

from qsearch.core.gates import gates_of
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials
from qsearch.stages.plans import predicted_loss

BUDGETS = (3.0, 4.5, 6.0)
#: metric -> its limit
GATES = {"ssim": ">= 0.9", "sqnr": ">= 15"}
#: metric -> what of it lies on a line over the predicted SQNR
STRAIGHT: dict[str, Callable[[float], float]] = {
    "ssim": lambda value: math.log(1 - value),
    "sqnr": lambda value: value,
}
PROTOCOL = {
    "title": "the gate of servers at the zoo's size",
    "source": "vllm-project/vllm-omni, issue 7342, with SSIM and SQNR instead of LPIPS",
    "prompts": {"samples": 1},
    "seeds": [42, 43, 44, 45, 46],
    "sampling": {"steps": 20},
    "metrics": ["sqnr", "ssim", "psnr"],
}
PROMPT = "a large red ring at the left and a small blue square at the right, on a white background"


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["scenes-dit", "scenes-unet"])
    parser.add_argument("--folder", type=Path, default=Path("runs/gates"))
    options = parser.parse_args()
    rows = [
        row
        for model in options.models
        for gate in GATES
        for row in measured(model, gate, options.folder / f"{model}-{gate}")
    ]
    publish(__file__, rows, title="A server's gate on the zoo", seed=0)


def measured(model: str, gate: str, folder: Path) -> list[dict[str, Any]]:
    """A row a budget, and one of the smallest plan that passes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
    own = {**PROTOCOL, "gates": {gate: GATES[gate]}}
    (folder / "gate.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    run, rows, seen = folder / "run", [], []
    for bits in BUDGETS:
        config = {
            "model": model,
            "protocol": {
                "name": str((folder / "gate.yaml").resolve()),
                "prompts": str((folder / "prompt.txt").resolve()),
            },
            "allocate": {"average_bits": bits},
            "folder": str(run.resolve()),
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        code = called("run", str(folder / "config.yaml"))
        graph = OpGraph.load(run / "graph.json")
        plan = Plan.load(run / "plan.json", graph)
        value, error = measured_of(run)[gate]
        seen.append((predicted(plan), value))
        rows.append(row(model, gate, f"run at {bits:g} bits", plan, value, error, code))
    code = called("allocate", str(run), "--passing")
    plan = Plan.load(run / "plan.json", graph)
    trials = Trials(run / "trials.db", graph).all()
    [found] = [t.metrics for t in trials if t.plan == plan.id]
    count = sum(t.name.startswith("gate") for t in trials)
    called("allocate", str(run), "--frontier")
    [asked] = gates_of({gate: GATES[gate]})
    goal = needed(STRAIGHT[gate], asked.limit, seen)
    plans = [Plan.load(path, graph) for path in (run / "frontier").glob("plan-*.json")]
    reached = [p.achieved.average_bits for p in plans if predicted(p) >= goal]
    last = row(model, gate, "smallest that passes", plan, *found[gate], code)
    return [*rows, {**last, "measured plans": count, "frontier": min(reached, default=math.nan)}]


def row(
    model: str, gate: str, what: str, plan: Plan, value: float, error: float, code: int
) -> dict[str, Any]:
    """A row without what belongs to the search alone."""
    return {
        "model": model,
        "gate": f"{gate} {GATES[gate]}",
        "what": what,
        "stored bits": plan.achieved.average_bits,
        "value": value,
        "error": error,
        "exit": code,
        "measured plans": "",
        "frontier": "",
    }


def called(*words: str) -> int:
    """The exit code of a command in a process of its own."""
    code = subprocess.run([sys.executable, "-m", "qsearch.cli", *words], check=False).returncode
    if code not in (0, 3):
        raise SystemExit(f"qsearch {' '.join(words)} ended with {code}")
    return code


def measured_of(run: Path) -> dict[str, tuple[float, float]]:
    """Metrics of the run's own plan: (mean, standard error)."""
    held = json.loads((run / "results.json").read_text("utf-8"))
    [own] = [r["metrics"] for r in held["rows"] if r["plan"] == "plan"]
    return {name: (value[0], value[1]) for name, value in own.items()}


def needed(
    straight: Callable[[float], float], limit: float, seen: list[tuple[float, float]]
) -> float:
    """The predicted SQNR (dB) at which a metric is expected to reach `limit`.

    `seen`: the predicted SQNR and the metric of measured plans.
    """
    slope, start = np.polyfit([x for x, _ in seen], [straight(y) for _, y in seen], 1)
    return float((straight(limit) - start) / slope)


def predicted(plan: Plan) -> float:
    """The output SQNR (dB) that a plan's predicted noise says."""
    return -10 * math.log10(predicted_loss(plan))


if __name__ == "__main__":
    main()
