"""Does time pay? Inputs of so many bits in the mean, in all steps alike or by ranges of sampler
steps, at equal stored bits.

    python notebooks/figures/ranges.py [--models scenes-dit scenes-unet] [--seeds 5] [--samples 32]
    [--workers 2] [--ranges 1 3 5 --bins 15]

Weights are stored once (uint4-c@gptq), so that every plan takes the same bytes. The budget is bit
operations: those of inputs of 6 (or 5) bits at every layer in every step. `uniform` has 6 bits
everywhere; `1 range` chooses 4, 6 or 8 bits for each layer, more ranges for each layer in each
range. All plans of a seed see the same prompts and noise, so that the paired
difference from one range is much surer than either number. Writes ranges.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from figure import publish
from worlds import prompts_of, sampling_of

from qsearch import zoo
from qsearch.core.cost import Budget
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from qsearch.decide.allocation import allocate
from qsearch.graphs.extraction import extract
from qsearch.measure.evaluation import evaluate, make
from qsearch.measure.pipelines import (
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
)
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import weights_for

WEIGHT = "uint4-c{}@gptq"
CHOICES = tuple(WEIGHT.format(f"+a{bits}") for bits in (4, 6, 8))


def plans_of(graph: OpGraph, table: Any, bits: int, ranges: Sequence[int]) -> dict[str, Plan]:
    """Name -> plan whose weights have 4 bits and whose inputs have `bits` in the mean, by bit
    operations.
    """
    found, stored = {}, Plan.uniform(graph, CHOICES[0]).achieved.average_bits
    if bits == 6:
        found["uniform"] = Plan.uniform(graph, CHOICES[1])
        limit: float = found["uniform"].achieved.bit_operations
    else:
        four, six = (Plan.uniform(graph, s).achieved.bit_operations for s in CHOICES[:2])
        limit = (four + six) / 2
    for count in ranges:
        found[f"{count} range{'s' if count > 1 else ''}"] = allocate(
            graph,
            table,
            Budget(average_bits=stored, bit_operations=limit),
            schemes=CHOICES,
            steps=StepRanges.equal(count),
        )
    return found


def measured(model: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each plan of one model and seed."""
    pipe = load_pipeline(zoo.folder(model))
    denoiser = denoiser_of(pipe)
    sampling = sampling_of(model, seed=seed)
    fitting, testing = (
        prompts_of(model, 8, 2 * seed),
        prompts_of(model, options.samples, 2 * seed + 1),
    )
    graph = extract(denoiser, example_inputs(record(pipe, fitting[:1], sampling, 1)[0], denoiser))
    calls = record(pipe, fitting, sampling, options.bins, 2)
    chosen_by = record(pipe, fitting, replace(sampling, seed=seed + 250_000), options.bins, 4)
    table = profile(
        denoiser, graph, CHOICES, calls, pipe=pipe, probes=8, seed=seed, calibration=chosen_by
    )
    fresh = replace(sampling, seed=seed + 500_000)
    heard = record(pipe, testing[:8], fresh, options.bins)
    found = {bits: plans_of(graph, table, bits, options.ranges) for bits in (6, 5)}
    every = [plan for plans in found.values() for plan in plans.values()]
    weights = weights_for(denoiser, graph, every, chosen_by)
    full = make(pipe, graph, Plan.uniform(graph, "keep"), testing, fresh, heard)
    rows = []
    for bits, plans in found.items():
        for name, plan in plans.items():
            made = evaluate(
                make(pipe, graph, plan, testing, fresh, heard, weights=weights), full, ("sqnr",)
            )
            rows.append(
                {
                    "model": model,
                    "bits": bits,
                    "plan": name,
                    "stored": plan.achieved.average_bits,
                    "operations": plan.achieved.bit_operations,
                    "predicted": -10 * math.log10(table.predict(plan, interactions=False)[0]),
                    "output": made["output_sqnr"][0],
                    "latent": made["sqnr"][0],
                    "seed": seed,
                }
            )
            print(rows[-1], flush=True)
    return rows


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds with standard errors, and paired differences from one range."""
    found = []
    keys = dict.fromkeys((r["model"], r["bits"], r["plan"]) for r in rows)
    for model, bits, plan in keys:
        mine = [r for r in rows if (r["model"], r["bits"], r["plan"]) == (model, bits, plan)]
        one = [r for r in rows if (r["model"], r["bits"], r["plan"]) == (model, bits, "1 range")]
        row: dict[str, Any] = {"model": model, "mean bits": bits, "plan": plan}
        row["seeds"] = len(mine)
        row["stored bits"] = mine[0]["stored"]
        for metric in ("predicted", "output", "latent"):
            values = [r[metric] for r in mine]
            pairs = [a[metric] - b[metric] for a, b in zip(mine, one, strict=True)]
            row[f"{metric}, dB"] = f"{statistics.mean(values):.2f} ± {_error(values):.2f}"
            row[f"{metric} - 1 range"] = f"{statistics.mean(pairs):+.2f} ± {_error(pairs):.2f}"
        found.append(row)
    return found


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["scenes-dit", "scenes-unet"])
    parser.add_argument("--ranges", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--bins", type=int, default=15, help="a multiple of each of the ranges")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    options = parser.parse_args()
    work = [(m, seed, options) for seed in range(options.seeds) for m in options.models]
    done: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(measured, *each): each[:2] for each in work}
        for future in as_completed(waiting):  # published as far as it goes, so that nothing is lost
            done[waiting[future]] = future.result()
            rows = [row for key in sorted(done) for row in done[key]]
            publish(
                __file__,
                summed(rows),
                title="inputs by ranges of sampler steps, weights stored once",
                seed=0,
                extra={"each": rows},
            )


if __name__ == "__main__":
    main()
