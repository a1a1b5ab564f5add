"""The two networks of scenes-ecar under one plan: which stage, block and network needs few bits,
and what plans gain over uniform ones of the same size.

    python notebooks/figures/ecar_plans.py [--samples 256 --steps 12 --probes 16 --folder FOLDER]

Sensitivities are followed through the whole generation (`mode: trajectory`): a layer's error at the
end is the sum of what its steps add, and steps are put together by stage. Plans: ours at the stored
bits of a uniform plan, and at 4.0 and 3.0; all of them with GPTQ, the same captions and noise;
`d` is the mean of paired differences from the uniform plan of that size. Writes ecar_plans.json and
ecar_plans.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from figure import publish
from matplotlib.figure import Figure

from qsearch.core.cost import Budget
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.measure.evaluation import Outcome, evaluated, make
from qsearch.measure.pipelines import record
from qsearch.stages import config as configs
from qsearch.stages.calibrate import calibration_calls, plan_weights
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile

CONFIG = Path(__file__).parents[2] / "configs" / "scenes-ecar.yaml"
METRICS = ("sqnr", "ssim", "alignment", "frechet")
SHOWN = "uint3-c@gptq"


def run_of(options: argparse.Namespace) -> Run:
    """The main job's run in a folder of its own, with finer probes."""
    config = configs.load(CONFIG)
    sampling = config.sampling.model_copy(update={"steps": options.steps})
    asked = config.profile.model_copy(update={"probes": options.probes})
    changes = {"folder": options.folder, "sampling": sampling, "profile": asked}
    return Run(config.model_copy(update=changes))


def by_stage(run: Run, graph: OpGraph, table: SensitivityTable) -> dict[str, list[float]]:
    """Network and block, or role outside of blocks -> share of the whole error at `SHOWN` that each
    stage adds.
    """
    assert table.responses is not None
    cell = ("sqnr", 0)
    scheduler = run.pipe.scheduler
    scheduler.set_timesteps(run.sampling.steps)
    stages = np.array(scheduler.stage_of_step)
    layers = {layer.name: layer for layer in graph}
    found: dict[str, Any] = defaultdict(lambda: np.zeros(stages.max() + 1))
    for row, (site, scheme) in enumerate(table.responses.choices):
        if scheme == SHOWN:
            layer = layers[site]
            component = graph.component(site)
            place = layer.block.removeprefix(f"{component}.") if layer.block else layer.role
            shares = table.responses.step_shares(cell, row)
            for stage in range(stages.max() + 1):
                found[f"{component}: {place}"][stage] += shares[stages == stage].sum()
    total = sum(values.sum() for values in found.values())
    return {name: list(values / total) for name, values in found.items()}


def draw(shares: dict[str, list[float]]) -> None:
    """A row for each block, a column for each stage."""
    names = list(shares)
    values = np.array([shares[n] for n in names]) * 100
    figure = Figure(figsize=(6.4, 0.28 * len(names) + 1.4), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(values, aspect="auto", cmap="cividis")
    count = values.shape[1]
    ax.set_xticks(range(count), [f"stage {k + 1}\n{4 * 2**k}x{4 * 2**k}" for k in range(count)])
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for i, k in np.ndindex(values.shape):
        light = values[i, k] < 0.6 * values.max()
        colour = "white" if light else "black"
        said = f"{values[i, k] + 0.0 if abs(values[i, k]) >= 0.05 else 0.0:.1f}"
        ax.text(k, i, said, ha="center", va="center", fontsize=7, color=colour)
    ax.set_title(f"% of the error of the final latents, all layers at {SHOWN}", fontsize=9)
    figure.colorbar(image, ax=ax, label="%")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


def plans_of(graph: OpGraph, table: SensitivityTable) -> list[tuple[str, Plan, str]]:
    """(name, plan, the plan that it is compared with)."""
    found = []
    for bits in (4, 3):
        uniform = Plan.uniform(graph, f"uint{bits}-c@gptq")
        name = f"uniform uint{bits}-c"
        size = uniform.achieved.average_bits
        found.append((name, uniform, name))
        for limit in (size, float(bits)):
            plan = allocate(graph, table, Budget(average_bits=limit), metric="sqnr")
            found.append((f"plan at {limit:.2f}", plan, name))
    return found


def measured(run: Run, graph: OpGraph, table: SensitivityTable, samples: int) -> list[Any]:
    """A row for each plan."""
    prompts, sampling = run.prompts(samples, part=1), replace(run.sampling, seed=500_000)
    calls = record(run.pipe, prompts[:8], sampling, 3)

    def made(plan: Plan, weights: Any = None) -> Outcome:
        return make(run.pipe, graph, plan, prompts, sampling, calls, weights=weights)

    whole = made(Plan.uniform(graph, KEEP))
    found, values = evaluated(whole, whole, METRICS)
    rows = [row_of("full precision", 16.0, found, {})]
    held: dict[str, dict[str, list[float]]] = {}
    for name, plan, other in plans_of(graph, table):
        calibration = calibration_calls(run, graph, plan.schemes)
        weights = plan_weights(run, graph, plan, calibration, learn=False)
        found, values = evaluated(made(plan, weights), whole, METRICS)
        held[name] = values
        pairs = {
            metric: [a - b for a, b in zip(values[metric], held[other][metric], strict=True)]
            for metric in ("sqnr", "ssim", "alignment")
        }
        rows.append(row_of(name, plan.achieved.average_bits, found, pairs))
        print(rows[-1], flush=True)
    return rows


def row_of(
    name: str, bits: float, found: dict[str, tuple[float, float]], pairs: dict[str, list[float]]
) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"plan": name, "stored bits": bits}
    for metric in METRICS:
        row[metric] = f"{found[metric][0]:.4g} ± {found[metric][1]:.2g}"
    for metric in ("sqnr", "ssim", "alignment"):
        own = pairs.get(metric, [])
        error = statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 1 else math.nan
        row[f"d {metric}"] = f"{statistics.mean(own):+.3g} ± {error:.2g}" if own else "-"
    return row


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/ecar-plans"))
    options = parser.parse_args()
    run = run_of(options)
    graph = extract(run)
    table = profile(run, graph)
    shares = by_stage(run, graph, table)
    draw(shares)
    rows = measured(run, graph, table, options.samples)
    publish(
        __file__, rows, title="scenes-ecar: plans", seed=0, extra={"share of the error": shares}
    )


if __name__ == "__main__":
    main()
