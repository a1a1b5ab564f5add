"""Quantized video: ViDiT-Q's recipes and ours at equal stored bits, and does it pay to score layers
by the metric that matters for them?

    python notebooks/figures/video.py [--part methods decoupled] [--samples 64] [--steps 20]
    [--folder runs/video]

`methods`: full precision, ViDiT-Q at W8A8, W4A8 and W4A8-MP, uniform W4A8, naive min-max, and plans
of ours with 8-bit inputs, the last three at the stored bits of W4A8-MP. `decoupled`: plans of the
same choices at the same stored bits, allocated by one metric each (noise of a call, or alignment,
temporal or sqnr through the clean clip) and by `scored`, each layer by its own. All plans see the
same captions and noise; a cell is the mean and its standard error, `d NAME` the mean difference
from full precision, clip by clip, where that has a value (metrics against full precision have
none). Resumable: rows are kept in FOLDER. Writes video.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from figure import publish
from methods import FOLDER as RECIPES
from methods import naive, recipe_plan

from qsearch.core.artifacts import digest
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

PARTS = ("methods", "decoupled")
METRICS = ("alignment", "motion", "temporal", "flow", "frechet", "ssim", "sqnr")
#: metrics of a clip by itself, whose differences from full precision are taken clip by clip
ALONE = ("alignment", "motion", "flow")
MIXED = "viditq-video-w4a8-mp"
OURS = tuple(f"uint{bits}-c+a8@gptq" for bits in (2, 3, 4, 5, 6, 8))


def run_of(name: str, options: argparse.Namespace, **profiled: Any) -> Run:
    """A recipe's run in a folder of its own."""
    config = configs.load(RECIPES / f"{name}.yaml")
    sampling = config.sampling.model_copy(update={"steps": options.steps})
    asked = config.profile.model_copy(update=profiled)
    place = options.folder / f"{name}{'-ours' if profiled else ''}"
    return Run(config.model_copy(update={"folder": place, "sampling": sampling, "profile": asked}))


def priced(options: argparse.Namespace) -> tuple[Run, SensitivityTable, Budget]:
    """Our choices, priced by every metric, and the stored bits of W4A8-MP."""
    run = run_of(MIXED, options)
    graph = extract(run)
    bits = recipe_plan(run, graph).achieved.average_bits
    run = run_of(MIXED, options, schemes=OURS)
    return run, profile(run, extract(run)), Budget(average_bits=bits)


def plans(part: str, options: argparse.Namespace) -> Iterator[tuple[str, Run, Plan]]:
    """(what it is, its run, plan)."""
    if part == "methods":
        for name in ("viditq-video-w8a8", "viditq-video-w4a8", MIXED):
            run = run_of(name, options)
            yield name, run, recipe_plan(run, extract(run))
    run, table, budget = priced(options)
    graph = extract(run)
    if part == "methods":
        mixed = recipe_plan(run_of(MIXED, options), graph)
        yield "uniform W4A8", run, Plan.uniform(graph, "uint4-c+a8")
        yield "naive", run, naive(graph, mixed)
        yield "ours", run, allocate(graph, table, budget)
    else:
        for metric in ("noise", "scored", "alignment", "temporal", "sqnr"):
            yield f"by {metric}", run, allocate(graph, table, budget, metric=metric)


def measure(part: str, options: argparse.Namespace, kept: dict[str, Any], path: Path) -> None:
    """Add the rows of a part to `kept`, and write it after each."""
    reference: tuple[Outcome, dict[str, list[float]]] | None = None
    for what, run, plan in plans(part, options):
        key = digest([what, plan.id, options.samples, options.steps])
        if key in kept:
            continue
        graph = extract(run)
        prompts = run.prompts(options.samples, part=1)
        sampling = replace(run.sampling, seed=500_000)
        calls = record(run.pipe, prompts[:4], sampling, 2)

        def made(
            plan: Plan,
            weights: Any,
            graph: OpGraph = graph,
            run: Run = run,
            of: Any = (prompts, sampling, calls),
        ) -> Outcome:
            return make(run.pipe, graph, plan, *of, weights=weights)

        if reference is None:
            whole = made(Plan.uniform(graph, KEEP), None)
            found, values = evaluated(whole, whole, METRICS)
            reference = (whole, values)
            kept[digest(["full precision", options.samples, options.steps])] = row_of(
                part, "full precision", 16.0, found, values, values
            )
        calibration = calibration_calls(run, graph, plan.schemes)
        weights = plan_weights(run, graph, plan, calibration, learn=False)
        found, values = evaluated(made(plan, weights), reference[0], METRICS)
        bits = plan.achieved.average_bits
        kept[key] = row_of(part, what, bits, found, values, reference[1])
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        print(kept[key], flush=True)


def row_of(
    part: str,
    what: str,
    bits: float,
    found: dict[str, tuple[float, float]],
    values: dict[str, list[float]],
    whole: dict[str, list[float]],
) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"part": part, "plan": what, "stored bits": bits}
    for metric, (value, error) in found.items():
        if metric != "noise":
            row[metric] = f"{value:.4g} ± {error:.2g}"
    for metric in ALONE:
        pairs = [a - b for a, b in zip(values[metric], whole[metric], strict=True)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        row[f"d {metric}"] = f"{statistics.mean(pairs):+.3g} ± {error:.2g}"
    return row


def main() -> None:
    """Measure what is missing, publish all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/video"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for part in options.part:
        path = options.folder / f"rows-{part}.json"
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        measure(part, options, kept, path)
        rows += kept.values()
    publish(__file__, rows, title="Quantized video, scenes-video", seed=0)


if __name__ == "__main__":
    main()
