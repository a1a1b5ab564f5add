"""The arena: other tools' scores and papers' recipes against ours, at equal stored bits and equal
bit operations, on one of the zoo's models.

    python notebooks/figures/arena.py MODEL [--seeds 5] [--captions 8] [--bits 3 4]
    [--parts scores recipes] [--folder runs/arena]

`scores`: all choose among the same schemes (integers with GPTQ, k-means) with the same calibrated
weights, by scores of their own (arena_scores.py), at the stored bits of `--bits`; `qsearch: all
choices` has trellis codes, rotations and small floats besides.
`recipes`: each paper's recipe (configs/methods) with its own transforms, inputs and ranges, against
our plan with no more stored bits and no more bit operations, priced by probes through the sampler
to the final latents (clips: of single steps), and against naive min-max (methods.py says what that
is). What a recipe learns is learnt once, by the first seed's calls.

A seed is of captions, noise, recorded calls and probes; plans are measured on captions and noise
that none was made from. `ahead` is how much better ours is by the final latents' SQNR, in pairs
with the same captions and noise: mean and standard error over seeds. `apart` is the standard error
that the same difference has when the two are measured on noise of their own, `captions` how many
are needed to tell the two plans apart (95 %) with the same noise, and `captions apart` without.
Measured rows are kept in FOLDER until all are there. Writes arena-MODEL.json and arena-MODEL.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import Any

import methods
import numpy as np
import torch
from arena_scores import Ring, contestants
from figure import commit, publish
from worlds import MODELS, prompts_of, sampling_of

from qsearch import zoo
from qsearch.core.cost import Budget, can_have
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.graphs.extraction import extract
from qsearch.measure.evaluation import Outcome, evaluated, make
from qsearch.measure.options import ProfileOptions
from qsearch.measure.pipelines import (
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
)
from qsearch.measure.profiling import ProfileWork, profile
from qsearch.measure.quantized_weights import QuantizedWeights, calibrated_weights, weights_for
from qsearch.measure.trajectory import trajectories
from qsearch.stages import config as configs
from qsearch.stages.calibrate import calibration_calls, plan_weights
from qsearch.stages.folder import Run

HERE = Path(__file__).parent
SCHEMES = ("uint2-c@gptq", "uint3-c@gptq", "uint4-c@gptq", "uint8-c", "km3-c", "km4-c")
MORE = ("tcq2-c~rotate@ldlq", "tcq3-c~rotate@ldlq", "tcq4-c~rotate@ldlq", "e2m1-g64@gptq")
#: what our plans choose from against recipes
OURS = (
    *("uint2-c@gptq", "uint3-c@gptq", "uint4-c@gptq", "uint8-c"),
    *("uint3-c+a8@gptq", "uint4-c+a8@gptq", "uint8-c+a8"),
    *("uint4-c+a6@gptq", "uint8-c+a6", "uint4-c+a4~rotate@gptq", "uint8-c+a4~rotate"),
    *("uint4-c+a8~balance50@gptq", "uint8-c+a8~balance30", "uint8-c+a8~rotate"),
    *("uint4-c+a4~rotate~lowrank16@gptq", "int4-g64+aint4g64~balance50~lowrank32@gptq"),
)
OWN = "qsearch: probes"
ALL = "qsearch: all choices"
METRICS = ("sqnr", "alignment", "ssim")
STEPS, BINS, PROBES, PLANS = 20, 2, 8, 64
#: step bins that our weights are calibrated on, where recipes' are on as many
CALIBRATED = 4


class Corner:
    """A model with the captions, noise and calls of one seed."""

    def __init__(self, name: str, seed: int, captions: int, graph: OpGraph | None = None) -> None:
        self.name, self.seed, self.captions = name, seed, captions
        self.pipe = load_pipeline(zoo.folder(name))
        self.model = model_of(self.pipe).requires_grad_(False)
        if graph is None:
            call, *_ = record(self.pipe, prompts_of(name, 1, 0), self.sampling(0), 1)
            graph = extract(self.model, example_inputs(call, self.model), name=name)
        self.graph = graph

    def sampling(self, seed: int) -> Sampling:
        """20 steps as the model is sampled."""
        return sampling_of(self.name, STEPS, seed=seed, batch=self.captions)

    def recorded(self, bins: int = BINS, **options: Any) -> list[Any]:
        """Calls of four captions in each step bin."""
        prompts = prompts_of(self.name, 4, 2 * self.seed)
        return record(self.pipe, prompts, self.sampling(self.seed), bins, **options)

    def priced(self, weights: QuantizedWeights) -> SensitivityTable:
        """Our table of `OURS`: by probes through the sampler to the final latents, for clips of
        single steps, which take a quarter of the time and rank plans worse.
        """
        moving = self.name in zoo.VIDEO_NAMES
        options = ProfileOptions(
            estimator="probe",
            mode="step" if moving else "trajectory",
            metrics=("noise" if moving else "sqnr",),
            probes=PROBES,
            seed=self.seed,
        )
        if moving:
            calls: list[Any] = self.recorded(batch=1)
        else:
            prompts = prompts_of(self.name, 4, 2 * self.seed)
            calls = trajectories(self.pipe, prompts, self.sampling(self.seed))
        work = ProfileWork(pipe=self.pipe, weights=weights)
        return profile(self.model, self.graph, OURS, calls, options, work)

    def outcome(self, plan: Plan, weights: QuantizedWeights | None = None) -> Outcome:
        """What a plan makes of the captions that no plan was made from."""
        prompts = prompts_of(self.name, self.captions, 2 * self.seed + 1)
        sampling = replace(self.sampling(self.seed + 500_000), batch=min(self.captions, 8))
        return make(self.pipe, self.graph, plan, prompts, sampling, weights=weights)

    @cached_property
    def reference(self) -> Outcome:
        """The same in full precision."""
        return self.outcome(Plan.uniform(self.graph, KEEP))

    def measured(self, plan: Plan, weights: QuantizedWeights | None) -> dict[str, Any]:
        """A plan's size, and each metric's value for each caption."""
        outcome = self.outcome(plan, weights)
        metrics = [m for m in METRICS if m != "alignment" or self.name in MODELS]
        _, samples = evaluated(outcome, self.reference, metrics)
        shown = outcome.pictures[0]
        shown = shown[len(shown) // 2] if shown.ndim == 4 else shown  # a clip's middle
        return {
            "stored bits": plan.achieved.average_bits,
            "bit operations": plan.achieved.bit_operations,
            "samples": {m: samples[m] for m in metrics},
            "picture": shown.tolist() if self.seed == 0 else [],
        }


def scores(corner: Corner, budgets: list[float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Key -> what measures it, of all contestants at each budget."""
    calls, parts = corner.recorded(), corner.recorded(batch=1)

    def ring(schemes: tuple[str, ...]) -> Ring:
        wanted = {
            x.name: [s for s in map(Scheme.parse, schemes) if can_have(x, s)]
            for x in corner.graph.quantizable
        }
        weights = calibrated_weights(corner.model, corner.graph, wanted, calls)
        return Ring(
            corner.model, corner.graph, schemes, calls, parts, weights, corner.seed, PROBES, PLANS
        )

    own, wide = ring(SCHEMES), ring(SCHEMES + MORE)
    made = contestants(own) | {ALL: contestants(wide)[OWN]}
    for name, begin in made.items():
        planner: list[Any] = []
        for bits in budgets:

            def work(
                name: str = name,
                bits: float = bits,
                begin: Callable[[], Any] = begin,
                planner: list[Any] = planner,
            ) -> Any:
                if not planner:
                    planner.append(begin())
                used = wide.weights if name == ALL else own.weights
                return corner.measured(planner[0](bits), used)

            yield f"scores|{bits:g}|{name}", work


def recipes(corner: Corner, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same of each recipe, of our plan within its limits, and of the naive one."""
    calls = corner.recorded(CALIBRATED)
    table: list[Any] = []

    def ours(plan: Plan) -> dict[str, Any]:
        if not table:
            wanted = {
                x.name: [s for s in map(Scheme.parse, OURS) if can_have(x, s)]
                for x in corner.graph.quantizable
            }
            weights = calibrated_weights(corner.model, corner.graph, wanted, calls)
            table.append(corner.priced(weights))
        held = plan.achieved
        budget = Budget(average_bits=held.average_bits, bit_operations=held.bit_operations)
        best = allocate(corner.graph, table[0], budget, metric=table[0].metrics[0])
        return corner.measured(best, weights_for(corner.model, corner.graph, [best], calls))

    moving = corner.name in zoo.VIDEO_NAMES
    for path in sorted(methods.FOLDER.glob("*.yaml")):
        if ("video" in path.stem) != moving:
            continue
        config = methods.fitted(configs.load(path), corner.name)
        config = config.model_copy(
            update={
                "folder": folder / f"{path.stem}-{corner.name}",
                "seed": corner.seed,
                "sampling": config.sampling.model_copy(update={"steps": STEPS}),
            }
        )
        run = Run(config)
        try:
            plan = methods.recipe_plan(run, corner.graph)
        except QSearchError as error:
            print(f"{path.stem}: {error}", flush=True)
            continue
        held = methods.of(corner.graph, plan)
        if path.stem in methods.LINEAR and any(
            s.transforms and x.kind != "linear" for x, s in held
        ):
            continue

        def recipe(run: Run = run, plan: Plan = plan) -> Any:
            own = calibration_calls(run, corner.graph, plan.schemes)
            learn = run.config.reconstruct.order != "none" and corner.seed == 0
            return corner.measured(plan, plan_weights(run, corner.graph, plan, own, learn=learn))

        def naive(run: Run = run, plan: Plan = plan) -> Any:
            made = methods.naive(corner.graph, plan)
            own = calibration_calls(run, corner.graph, made.schemes)
            return corner.measured(made, plan_weights(run, corner.graph, made, own, learn=False))

        key = f"recipes|{path.stem}|"
        yield key + OWN, lambda plan=plan: ours(plan)  # type: ignore[misc]
        yield key + "the paper's recipe", recipe
        yield key + "naive min-max", naive


def decibels(measured: dict[str, Any]) -> np.ndarray[Any, Any]:
    """SQNR of each caption."""
    return np.array(measured["samples"]["sqnr"])


def rows_of(name: str, found: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a model from seed -> key -> what was measured."""
    rows = []
    for key in next(iter(found.values())):
        part, where, whose = key.split("|", 2)
        mine = [held[key] for held in found.values() if key in held]
        best = f"{part}|{where}|{OWN}"
        pairs = [
            decibels(held[best]) - decibels(held[key]) for held in found.values() if key in held
        ]
        ahead = np.array([pair.mean() for pair in pairs])
        all_pairs = np.concatenate(pairs)
        own, theirs = (
            np.concatenate([decibels(h[k]) for h in found.values() if key in h])
            for k in (best, key)
        )
        gap, alone = abs(float(all_pairs.mean())), math.hypot(own.std(ddof=1), theirs.std(ddof=1))
        row: dict[str, Any] = {"model": name, "part": part, "at": where, "whose": whose}
        row["stored bits"] = float(np.mean([m["stored bits"] for m in mine]))
        row["bit operations"] = float(np.mean([m["bit operations"] for m in mine]))
        for metric in mine[0]["samples"]:
            means = np.array([np.mean(m["samples"][metric]) for m in mine])
            row[metric], row[f"± {metric}"] = float(means.mean()), standard_error(means)
        row["ahead, dB"], row["± ahead"] = float(ahead.mean()), standard_error(ahead)
        row["apart, dB"] = alone / math.sqrt(len(own))
        for title, spread in (
            ("captions", float(all_pairs.std(ddof=1))),
            ("captions apart", alone),
        ):
            row[title] = math.ceil((1.96 * spread / gap) ** 2) if gap else 0
        rows.append(row)
    return rows


def standard_error(values: np.ndarray[Any, Any]) -> float:
    """Of the mean over seeds."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def draw(name: str, held: dict[str, Any]) -> None:
    """The first caption's picture by every plan of the first seed: of scores a line a budget, of
    recipes a line for ours, theirs and naive.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[str, Any]]] = {}
    for key, measured in held.items():
        part, where, whose = key.split("|", 2)
        line, over = (f"{where} bits", whose) if part == "scores" else (whose, where)
        if measured["picture"]:
            lines.setdefault(line, []).append((over, measured["picture"]))
    width = max(map(len, lines.values()))
    figure = Figure(figsize=(1.5 * width, 1.7 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), width, squeeze=False)
    for line, (title, pictures) in zip(axes, lines.items(), strict=True):
        for ax in line:
            ax.axis("off")
        for ax, (over, picture) in zip(line, pictures, strict=False):
            ax.imshow((torch.tensor(picture).permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy())
            ax.set_title("\n".join(wrap(over, 22)), fontsize=5)
        line[0].text(
            -0.1, 0.5, title, rotation=90, va="center", fontsize=6, transform=line[0].transAxes
        )
    figure.savefig(HERE / f"arena-{name}.png", dpi=110)


def main() -> None:
    """Measure what is missing, publish all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=["scores", "recipes"])
    parser.add_argument("--bits", nargs="+", type=float, default=[3.0, 4.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("runs/arena"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    name, found = options.model, dict[int, dict[str, Any]]()
    for seed in range(options.seeds):
        path = options.folder / f"{commit()}-{name}-{options.captions}-{seed}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        corner = Corner(name, seed, options.captions)
        entries = []
        if "scores" in options.parts:
            entries += list(scores(corner, options.bits))
        if "recipes" in options.parts:
            entries += list(recipes(corner, options.folder))
        for key, work in entries:
            if key not in held:
                begun = time.monotonic()
                held[key] = work()
                path.write_text(json.dumps(held), encoding="utf-8")
                taken = time.monotonic() - begun
                reached = f"{decibels(held[key]).mean():.2f} dB, {taken:.0f} s"
                print(f"{name} {seed} {key}: {reached}", flush=True)
        found[seed] = {key: held[key] for key, _ in entries}
    draw(name, found[0])
    publish(
        str(HERE / f"arena-{name}.py"),
        rows_of(name, found),
        title=f"arena: {name} at equal stored bits",
        seed=0,
        extra={"captions a seed": options.captions, "seeds": options.seeds},
    )


if __name__ == "__main__":
    main()
