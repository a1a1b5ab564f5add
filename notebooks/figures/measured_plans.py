"""Many measured plans of the zoo, to learn from: the input of surrogates.py and explanations.py.
Resumable; several of these may run at once.

    python notebooks/figures/measured_plans.py scenes-dit [--folder FOLDER --plans 300 --samples 16
    --steps 6] python notebooks/figures/measured_plans.py scenes-dit --table [--probes 12 --bins 4]

The first draws random plans as Qua²SeDiMo does, from hardly hurt to badly broken, and measures them
into FOLDER/MODEL/trials.db; the second prices every choice by probes, per step bin (step.parquet)
and through the whole sampler (trajectory.parquet).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from worlds import MODELS, prompts_of, sampling_of

from qsearch import zoo
from qsearch.core.artifacts import digest
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.decide.draws import draw
from qsearch.graphs.extraction import extract
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.pipelines import (
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
)
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.setting import EvaluationSetting

FOLDER = Path("runs/measured-plans")
SCHEMES = ("int2-c", "uint2-c", "km2-c", "uint3-c", "km3-c", "uint4-c", "km4-c", "e2m1-g64")
METRICS = ("sqnr", "alignment", "ssim")


def graph_of(pipe: Any, folder: Path, name: str) -> OpGraph:
    """The graph in the folder, read from the model where there is none yet."""
    try:
        return OpGraph.load(folder / "graph.json")
    except QSearchError:
        call, *_ = record(pipe, prompts_of(name, 1, 0), sampling_of(name, 2), bins=1)
        graph = extract(denoiser_of(pipe), example_inputs(call, denoiser_of(pipe)), name=name)
        graph.save(folder / "graph.json")
        return graph


def main() -> None:
    """Measure plans, or make the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--table", action="store_true")
    for name, value in {
        "plans": 300,
        "samples": 16,
        "steps": 6,
        "seed": 0,
        "workers": 1,
        "probes": 12,
        "bins": 4,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    torch.set_num_threads(1)
    folder = o.folder / o.model
    pipe = load_pipeline(zoo.folder(o.model))
    graph = graph_of(pipe, folder, o.model)
    if o.table:
        settings = {"estimator": "probe", "probes": o.probes, "seed": o.seed, "say": print}
        prompts, sampling = (
            prompts_of(o.model, 8, o.seed),
            sampling_of(o.model, o.steps, seed=o.seed),
        )
        for mode, metrics in (("step", ("noise",)), ("trajectory", METRICS)):
            began = time.monotonic()
            partial = folder / f"{mode}.partial.parquet"
            table = profile_pipeline(
                pipe,
                graph,
                prompts,
                sampling,
                schemes=SCHEMES,
                bins=o.bins,
                batch=4,
                mode=mode,
                metrics=metrics,
                partial=partial,
                **settings,
            )
            table.save(folder / f"{mode}.parquet", seed=o.seed)
            print(
                f"{mode}: {len(table.frame):,} measurements in {time.monotonic() - began:.0f} s",
                flush=True,
            )
        return
    sampling = sampling_of(o.model, o.steps, seed=o.seed + 500_000)
    prompts = prompts_of(o.model, o.samples, o.seed * 2 + 1)
    key = digest(
        {
            "model": o.model,
            "samples": o.samples,
            "steps": o.steps,
            "seed": o.seed,
            "metrics": METRICS,
        }
    )
    setting = EvaluationSetting(prompts, sampling, METRICS, key)
    task = EvaluationTask(zoo.folder(o.model), graph, setting, folder / "trials.db")
    began, done = time.monotonic(), 0

    def progress(n: int) -> None:
        nonlocal done
        done += n
        print(f"{o.model}: {done} of {o.plans} plans, {time.monotonic() - began:.0f} s", flush=True)

    measure_plans(
        task,
        draw(graph, SCHEMES, o.plans, seed=o.seed),
        ExecutorOptions(workers=o.workers),
        progress=progress,
        say=print,
        pipe=pipe,
    )


if __name__ == "__main__":
    main()
