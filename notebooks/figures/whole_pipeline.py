"""A whole pipeline at 40 % of its 16-bit bytes: denoiser, text encoder and VAE in one plan, or the
denoiser alone squeezed to the same total.

    python notebooks/figures/whole_pipeline.py [--model scenes-dit] [--seeds 3] [--samples 32]
    [--steps 10] [--share 0.4]

Both plans come from one table: probes through the whole sampler, from the decoded pictures back
into the text encoder, and both are chosen by the noise of the pictures. `one plan` may change every
layer; `denoiser alone` keeps text encoder and VAE in 16 bits, so that the denoiser pays for them.
Layers that no text-to-picture call runs (the VAE's encoder, embeddings) stay in 16 bits in both,
and count. All plans of a seed see the same prompts and noise: the paired difference is much surer
than either number. Writes whole_pipeline.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from typing import Any

from figure import publish

from qsearch import zoo
from qsearch.core.cost import Budget, cost
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import FULL_BITS
from qsearch.decide.allocation import allocate
from qsearch.decide.constraints import Constraints
from qsearch.graphs.extraction import extract
from qsearch.measure.evaluation import make, measurements
from qsearch.measure.pipelines import (
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
    scene_prompts,
)
from qsearch.measure.profiling import profile_pipeline

COMPONENTS = ("text_encoder", "transformer", "vae")
SCHEMES = tuple(f"uint{bits}-c@search" for bits in (2, 3, 4, 5, 6, 8))
PRICED = "psnr"
FULL = "full precision"
METRICS = ("alignment", "ssim", PRICED, "sqnr")


def plans_of(graph: OpGraph, table: Any, share: float) -> dict[str, Plan]:
    """Name -> plan within `share` of the 16-bit bytes of all components."""
    budget = Budget(average_bits=FULL_BITS * share)
    others = tuple(f"{name}.*" for name in COMPONENTS if name != "transformer")
    alone = Constraints(protected=others)
    return {
        "one plan": allocate(graph, table, budget, metric=PRICED),
        "denoiser alone": allocate(graph, table, budget, metric=PRICED, constraints=alone),
    }


def bits_of(graph: OpGraph, plan: Plan, component: str) -> float:
    """Stored bits a weight of one component, layers that are kept included."""
    pattern = f"{component}.*"
    return cost(graph, plan.choices, groups=(pattern,)).groups[pattern]["average_bits"]


def measured(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each plan of one seed, with the values of its samples."""
    pipe = load_pipeline(zoo.folder(options.model))
    sampling = Sampling(options.steps, seed=seed, batch=options.samples)
    fitting, testing = scene_prompts(4, 2 * seed), scene_prompts(options.samples, 2 * seed + 1)
    model = model_of(pipe, COMPONENTS)
    first, *_ = record(pipe, fitting[:1], sampling, 1, components=COMPONENTS)
    graph = extract(model, example_inputs(first, model), name=options.model)
    began = time.monotonic()
    table = profile_pipeline(
        pipe,
        graph,
        fitting,
        sampling,
        schemes=SCHEMES,
        metrics=(PRICED,),
        mode="trajectory",
        probes=options.probes,
        seed=seed,
    )
    seconds = time.monotonic() - began
    fresh = replace(sampling, seed=seed + 500_000)
    full = make(pipe, graph, Plan.uniform(graph, "keep"), testing, fresh)
    rows = []
    plans = {FULL: Plan.uniform(graph, "keep"), **plans_of(graph, table, options.share)}
    for name, plan in plans.items():
        outcome = full if name == FULL else make(pipe, graph, plan, testing, fresh)
        made = measurements(outcome, full, METRICS)
        row: dict[str, Any] = {"plan": name, "seed": seed, "bytes": plan.achieved.bytes}
        row["share"] = plan.achieved.average_bits / FULL_BITS
        row |= {f"bits of {part}": bits_of(graph, plan, part) for part in COMPONENTS}
        noise = table.predict(plan, PRICED)[0]
        row["predicted"] = -10 * math.log10(noise) if noise > 0 else None
        row["seconds of profiling"] = seconds
        row |= {metric: list(made[metric].samples) for metric in METRICS}
        rows.append(row)
        print({k: v for k, v in row.items() if k not in METRICS}, flush=True)
        print({m: made[m].mean for m in METRICS}, flush=True)
    return rows


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the samples of all seeds with standard errors, and paired differences from the
    denoiser alone.
    """
    found = []
    for plan in reversed(dict.fromkeys(row["plan"] for row in rows)):
        mine = [row for row in rows if row["plan"] == plan]
        other = [row for row in rows if row["plan"] == "denoiser alone"]
        out: dict[str, Any] = {"plan": plan, "seeds": len(mine)}
        out["% of 16-bit bytes"] = 100 * statistics.mean(row["share"] for row in mine)
        for part in COMPONENTS:
            out[f"bits, {part}"] = round(statistics.mean(r[f"bits of {part}"] for r in mine), 2)
        for metric in METRICS if plan != FULL else ("alignment",):
            values = [v for row in mine for v in row[metric]]
            pairs = [
                a - b
                for x, y in zip(mine, other, strict=True)
                for a, b in zip(x[metric], y[metric], strict=True)
            ]
            digits = 2 if metric not in {"ssim", "alignment"} else 4
            out[metric] = _with_error(values, digits, "")
            out[f"{metric} - alone"] = _with_error(pairs, digits, "+")
        found.append(out)
    return found


def _with_error(values: list[float], digits: int, sign: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Measure and publish, seed after seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="scenes-dit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--share", type=float, default=0.4)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows += measured(seed, options)
        publish(
            __file__,
            summed(rows),
            title=f"{options.model} as a whole pipeline at {100 * options.share:g} % of its "
            "16-bit bytes",
            seed=0,
            extra={"each": rows},
        )


if __name__ == "__main__":
    main()
