"""Each seed's own recipe (configs/methods) on both denoisers of the zoo at its own bits, against
naive min-max at equal stored bits.

    python notebooks/figures/methods.py [--models scenes-dit scenes-unet] [--recipes fp4dit-w4a6 …]
    [--samples 64] [--steps 20] [--iterations N] [--folder runs/methods]

All plans of a model are measured with the same captions and the same noise. Naive is asymmetric
min-max integers a channel, of the two widths between which the recipe's stored bits lie, at random
layers; its inputs are rounded to as many bits, with one static min-max scale each, and nothing is
kept. SVDQuant's is for models of linear layers, and left out of the other. `one range` and
`nearest` are a recipe without its ranges of steps, and without its reconstruction. `~bos` is left
out where the text encoder is not causal (scenes-dit). Resumable: every measured row is kept in
FOLDER, and rows of other models and recipes stay. Writes methods.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from figure import publish

from qsearch import zoo
from qsearch.core.artifacts import digest
from qsearch.core.cost import Budget
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.decide.allocation import random_plan
from qsearch.measure.evaluation import Outcome, evaluate, make
from qsearch.measure.pipelines import record
from qsearch.stages import config as configs
from qsearch.stages.allocate import make_plan
from qsearch.stages.calibrate import calibration_calls, plan_weights
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.plans import with_inputs
from qsearch.stages.profile import profile

FOLDER = Path(__file__).parents[2] / "configs" / "methods"
#: recipes whose transforms are for linear layers alone
LINEAR = ("svdquant-w4a4",)
METRICS = ("alignment", "frechet", "ssim", "sqnr")


def fitted(config: configs.Config, model: str) -> configs.Config:
    """The recipe on another model: no first token of its own where the text encoder looks both
    ways.
    """
    content = config.model_dump(mode="json") | {"model": model}
    for part in ("layers", "inputs"):
        if model != "scenes-unet":
            content["allocate"][part] = {
                k: v.replace("~bos", "") for k, v in content["allocate"][part].items()
            }
    return configs.parse(content, model)


def recipe_plan(run: Run, graph: OpGraph) -> Plan:
    """What the recipe asks for, priced where a budget is to be filled."""
    section = run.config.allocate
    table = None if section.layers else profile(run, graph)
    return make_plan(section, graph, table)  # type: ignore[arg-type]  # a plan by hand needs none


def naive(graph: OpGraph, plan: Plan) -> Plan:
    """Min-max integers of the widths around the plan's stored bits, at random layers, inputs in one
    static scale of as many bits.
    """
    bits = plan.achieved.average_bits
    widths = [
        b for b in range(2, 9) if Plan.uniform(graph, f"uint{b}-c").achieved.average_bits <= bits
    ]
    few = max(widths)
    made = random_plan(
        graph, [f"uint{few}-c", f"uint{min(8, few + 1)}-c"], Budget(average_bits=bits), 0
    )
    width = min(s.activation_bits for s in plan.schemes)
    return with_inputs(graph, made, {"*": f"+a{width}t"} if width < 16 else {})


def of(graph: OpGraph, plan: Plan) -> Iterator[tuple[LayerSpec, Scheme]]:
    """Every layer with each of its schemes."""
    for layer in graph:
        for scheme in plan.choices[layer.name]:
            yield layer, scheme


def variants(graph: OpGraph, run: Run, plan: Plan) -> Iterator[tuple[str, Plan, bool]]:
    """(what it is, plan, whether it is reconstructed) for the recipe, its parts, and the naive
    one.
    """
    learnt = run.config.reconstruct.order != "none"
    yield "recipe", plan, learnt
    if len(plan.steps) > 1:
        yield "one range", Plan.make(graph, plan.at(0)), False
    if learnt:
        yield (
            "nearest",
            Plan.make(
                graph,
                {
                    n: s if s == KEEP else Scheme.parse(str(s).partition("@")[0])
                    for n, s in plan.layers.items()
                },
            ),
            False,
        )
    yield "naive", naive(graph, plan), False


def measure(options: argparse.Namespace, model: str, kept: dict[str, Any], path: Path) -> None:
    """Add the rows of a model to `kept`, and write it after each."""
    graph, reference, setting = None, None, [options.samples, options.steps]
    for name in options.recipes:
        config = fitted(configs.load(FOLDER / f"{name}.yaml"), model)
        if options.iterations:
            config = config.model_copy(
                update={
                    "reconstruct": config.reconstruct.model_copy(
                        update={"steps": options.iterations}
                    )
                }
            )
        sampling = config.sampling.model_copy(update={"steps": options.steps})
        run = Run(
            config.model_copy(
                update={"folder": options.folder / f"{name}-{model}", "sampling": sampling}
            )
        )
        graph = graph or extract(run)
        plan = recipe_plan(run, graph)
        if name in LINEAR and any(s.transforms and x.kind != "linear" for x, s in of(graph, plan)):
            print(f"{name} is for models of linear layers; {model} has others", flush=True)
            continue
        for what, made, learn in variants(graph, run, plan):
            key = digest(
                [
                    name,
                    model,
                    what,
                    made.id,
                    config.reconstruct.model_dump() if learn else "",
                    config.calibrate.model_dump(),
                    setting,
                ]
            )
            if key in kept:
                continue
            prompts = run.prompts(options.samples, part=1)
            calls = record(run.pipe, prompts[:8], replace(run.sampling, seed=500_000), 2)
            if reference is None:
                reference = outcome_of(run, graph, Plan.uniform(graph, KEEP), prompts, calls, None)
            began = time.process_time()
            weights = plan_weights(
                run, graph, made, calibration_calls(run, graph, made.schemes), learn=learn
            )
            spent = time.process_time() - began
            found = evaluate(
                outcome_of(run, graph, made, prompts, calls, weights), reference, METRICS
            )
            row = {
                "model": model,
                "recipe": name,
                "plan": what,
                "stored bits": made.achieved.average_bits,
            }
            row |= {
                metric: f"{v:.4g} ± {e:.2g}"
                for metric, (v, e) in found.items()
                if metric != "noise"
            } | {"CPU s to make": spent}
            kept[key] = row
            path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            print(row, flush=True)


def outcome_of(
    run: Run, graph: OpGraph, plan: Plan, prompts: Any, calls: Any, weights: Any
) -> Outcome:
    """What a plan makes of the captions."""
    return make(
        run.pipe, graph, plan, prompts, replace(run.sampling, seed=500_000), calls, weights=weights
    )


def main() -> None:
    """Measure what is missing, publish all."""
    every = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(zoo.NAMES), choices=zoo.NAMES)
    parser.add_argument("--recipes", nargs="+", default=[n for n in every if "video" not in n])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--iterations", type=int, default=0, help="of reconstruction, a block; 0 = the recipe's own"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        path = options.folder / f"rows-{model}.json"
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        measure(options, model, kept, path)
    rows = [
        row
        for path in sorted(options.folder.glob("rows-*.json"))
        for row in json.loads(path.read_text(encoding="utf-8")).values()
    ]
    rows.sort(
        key=lambda row: (
            row["model"],
            row["recipe"],
            ("recipe", "one range", "nearest", "naive").index(row["plan"]),
        )
    )
    publish(
        __file__,
        rows,
        title=f"methods: {options.samples} captions, {options.steps} steps, common noise",
        seed=0,
    )


if __name__ == "__main__":
    main()
