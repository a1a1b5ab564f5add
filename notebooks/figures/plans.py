"""Plans: MixDQ's published ones solved again, the time of a frontier, and what plans of every kind
measure on the zoo.

    python notebooks/figures/plans.py reference frontier                        # a minute
    python notebooks/figures/plans.py measured [--models scenes-dit] [--seeds 5] [--random 200]
    [--samples 4] [--unseen 8]

`measured` (two to three hours of one core): for each model, budget and seed (of captions and noise,
for pricing and for measuring alike) the denoiser's output SQNR on calls that no plan was made from,
of: our plan by the one-at-a-time sweep, by probes, by probes with interactions, by probes and then
`refine`; and uniform, sum of decibels (MixDQ), weight error, fisher, the best of so many random
plans (chosen on the calls that ours is made from). All of them choose among the same schemes, with
the same weights; `--schemes` and `--name` measure another set beside them. Writes plans.json and
plans-MODEL.png beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from figure import publish

from qsearch.core.cost import Budget
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate, random_plan
from qsearch.decide.frontier import frontier
from qsearch.decide.objectives import Objective
from qsearch.decide.problem import Problem
from qsearch.decide.solvers import ilp, local

HERE = Path(__file__).parent
BITS = (2, 4, 8)
SCHEMES = (
    "uint2-c@gptq",
    "uint3-c@gptq",
    "uint4-c@gptq",
    "uint8-c",
    "km2-c",
    "km3-c",
    "km4-c",
    "e2m1-g64@gptq",
    "e2m3-g64@gptq",
)
PLAIN = ("uint4-c", "e2m1-g64")  # of 4 bits, to the nearest code: measured as uniform plans besides
BUDGETS = (2.75, 3.0, 3.5, 4.0, 5.0, 6.0)


# -------------------------------------------------------------------------- MixDQ's published plans


def problem(loss: dict[str, dict[int, float]], weights: dict[str, float], limit: float) -> Problem:
    """Least sum of losses, layer -> bits -> loss, at no more than `limit` weight-bits in all."""
    return Problem(
        sites=tuple(loss),
        choices=tuple(tuple(Scheme.parse(f"uint{b}-c") for b in row) for row in loss.values()),
        values=tuple(np.array(list(row.values())) for row in loss.values()),
        costs={
            "average_bits": tuple(
                weights[name] * np.array(list(row), float) for name, row in loss.items()
            )
        },
        limits={"average_bits": limit},
    )


def reference(folder: Path) -> list[dict[str, Any]]:
    """Its four integer programs, then one joint problem in noise power at each published size."""
    files = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (folder / "mixdq").glob("*.yaml")
    }
    sqnr, ssim, weights = files["weight_sqnr_db"], files["weight_ssim"], files["weight_ratio"]
    rows = []
    for name in ("plan_weight_4.00", "plan_weight_5.02"):
        published = files[name]
        for group, table, best in (
            ("content", ssim, 1.0),
            ("quality", {k: v for k, v in sqnr.items() if k not in ssim}, 120.0),
        ):
            loss = {
                n: {
                    b: best - x
                    for b, x in zip(BITS, row, strict=True)
                    if group == "content" or b > 2
                }
                for n, row in table.items()
            }
            began = time.perf_counter()
            chosen, said = ilp.solve(
                problem(loss, weights, sum(weights[n] * published[n] for n in table))
            )
            seconds = time.perf_counter() - began
            value = sum(table[n][BITS.index(s.bits)] for n, s in chosen.items())
            same = sum(s.bits == published[n] for n, s in chosen.items())
            rows.append(
                {
                    "plan": name,
                    "problem": group,
                    "objective": value,
                    "equal to it": f"{same}/{len(table)}",
                    "status": said.status,
                    "s": seconds,
                }
            )
        noise = {
            n: {b: 10 ** (-x / 10) for b, x in zip(BITS, row, strict=True)}
            for n, row in sqnr.items()
        }
        began = time.perf_counter()
        chosen, said = ilp.solve(
            problem(noise, weights, sum(weights[n] * published[n] for n in sqnr))
        )
        seconds = time.perf_counter() - began
        for whose, bits in (
            ("published", published),
            ("joint, noise power", {n: s.bits for n, s in chosen.items()}),
        ):
            decibels = -10 * math.log10(sum(noise[n][bits[n]] for n in sqnr))
            lost = sum(ssim[n][2] - ssim[n][BITS.index(bits[n])] for n in ssim)
            text = f"{decibels:.2f} dB, SSIM lost {lost:.4f}"
            rows.append(
                {
                    "plan": name,
                    "problem": whose,
                    "objective": decibels,
                    "equal to it": text,
                    "status": said.status,
                    "s": seconds,
                }
            )
    return rows


# ----------------------------------------------------------------------------------------- frontier


def random_problem(sites: int, choices: int, seed: int) -> Problem:
    """Layers whose sizes span three decades, noise that falls by about 6 dB a bit, over five
    decades from layer to layer.
    """
    dice = np.random.default_rng(seed)
    bits = np.linspace(2, 8, choices)
    options = tuple(Scheme.parse(f"uint{2 + i % 7}-g{8 * (1 + i)}") for i in range(choices))
    sizes = 10 ** dice.uniform(0, 3, sites)
    values = tuple(
        10 ** (dice.normal(-4, 1.2) - 0.6 * bits + dice.normal(0, 0.15, choices))
        for _ in range(sites)
    )
    costs = tuple(size * bits * dice.uniform(0.97, 1.03, choices) / sizes.sum() for size in sizes)
    return Problem(
        tuple(f"s{i}" for i in range(sites)),
        (options,) * sites,
        values,
        {"average_bits": costs},
        {"average_bits": 4.0},
    )


def timing(seed: int) -> list[dict[str, Any]]:
    """50 budgets at once, and one budget exactly, on as many layers as SDXL has and on 3,000."""
    rows = []
    for sites, choices, allowed in ((794, 12, 10.0), (3000, 16, 60.0)):
        asked = random_problem(sites, choices, seed)
        began, worked = time.perf_counter(), time.process_time()
        answers = frontier(asked, "average_bits", [float(b) for b in np.linspace(2.5, 7.5, 50)])
        gaps = [answer[1].gap for answer in answers if isinstance(answer, tuple)]
        whole = {
            "sites x choices": f"{sites} x {choices}",
            "what": f"{len(gaps)} budgets in one pass",
            "s": time.perf_counter() - began,
        }
        rows.append(
            {
                **whole,
                "CPU s": time.process_time() - worked,
                "allowed s": allowed,
                "largest gap": max(g for g in gaps if g is not None),
            }
        )
        began, worked = time.perf_counter(), time.process_time()
        _, said = ilp.solve(asked, seconds=allowed)
        one = {
            "sites x choices": f"{sites} x {choices}",
            "what": f"ilp at 4 bits: {said.status}",
            "s": time.perf_counter() - began,
        }
        rows.append(
            {
                **one,
                "CPU s": time.process_time() - worked,
                "allowed s": allowed,
                "largest gap": said.gap,
            }
        )
        dice = np.random.default_rng(seed)
        scores = dice.normal(size=(24, sites, choices)) + 0.3 * dice.normal(size=(24, 1, 1))
        scores *= np.sqrt(np.array(asked.values) / (scores**2).mean(0))
        began, worked = time.perf_counter(), time.process_time()
        _, said = local.solve(replace(asked, scores=scores, trust=0.1), seconds=allowed)
        one = {
            "sites x choices": f"{sites} x {choices}",
            "what": "local, 24 probes",
            "s": time.perf_counter() - began,
        }
        rows.append(
            {
                **one,
                "CPU s": time.process_time() - worked,
                "allowed s": allowed,
                "largest gap": said.gap,
            }
        )
    return rows


# ----------------------------------------------------------------------------------------- measured


def rounded(scheme: str, activation: str) -> str:
    """The scheme with its layer's input rounded."""
    return str(Scheme.parse(scheme).with_input(Scheme.parse(f"keep{activation}")))


def plans_of(
    name: str, seed: int, options: argparse.Namespace, done: Collection[tuple[float, str]]
) -> Iterator[tuple[float, str, Plan, Any]]:
    """(budget, whose, plan, how to measure it) for one model and seed, those that are `done` left
    out.
    """
    from qsearch import zoo
    from qsearch.decide.refinement import measure_noise, refine
    from qsearch.graphs.extraction import extract
    from qsearch.measure.pipelines import (
        Sampling,
        denoiser_of,
        example_inputs,
        load_pipeline,
        record,
        run,
        scene_prompts,
    )
    from qsearch.measure.profiling import profile
    from qsearch.measure.quantized_weights import calibrated_weights

    pipe = load_pipeline(zoo.folder(name))
    model = denoiser_of(pipe).requires_grad_(False)
    pricing = record(
        pipe,
        scene_prompts(options.samples, 2 * seed),
        Sampling(options.steps, options.guidance, seed),
        options.bins,
    )
    measuring = record(
        pipe,
        scene_prompts(options.unseen, 2 * seed + 1),
        Sampling(options.steps, options.guidance, seed + 500_000),
        options.bins,
    )
    parts = record(
        pipe,
        scene_prompts(options.samples, 2 * seed),
        Sampling(options.steps, options.guidance, seed),
        options.bins,
        batch=1,
    )
    graph = extract(model, example_inputs(pricing[0], model), name=name)
    schemes = [rounded(s, options.activation) for s in options.schemes]
    weights = calibrated_weights(
        model,
        graph,
        {layer.name: [Scheme.parse(s) for s in schemes] for layer in graph.quantizable},
        pricing,
    )
    references = [run(model, call) for call in measuring]
    known = [run(model, call) for call in pricing]
    glance = record(
        pipe, scene_prompts(2, 2 * seed), Sampling(options.steps, options.guidance, seed), 1
    )
    glanced = [run(model, call) for call in glance]

    def measure(plan: Plan) -> float:
        return -10 * math.log10(measure_noise(model, graph, plan, measuring, references, weights))

    def best_uniform(bits: float) -> Plan | None:
        return max(
            (p for s in schemes if (p := Plan.uniform(graph, s)).achieved.average_bits <= bits),
            key=measure,
            default=None,
        )

    def best_random(bits: float) -> Plan:
        """By the calls that our plans are made from: all at a glance (two captions, one step), then
        the best tenth on all of them.
        """
        dice = [
            random_plan(graph, schemes, Budget(average_bits=bits), 1000 * seed + i)
            for i in range(options.random)
        ]
        first = sorted(
            dice, key=lambda plan: measure_noise(model, graph, plan, glance, glanced, weights)
        )
        return min(
            first[: math.ceil(len(first) / 10)],
            key=lambda plan: measure_noise(model, graph, plan, pricing, known, weights),
        )

    @cache
    def priced(estimator: str) -> SensitivityTable:
        """Of weight and input together; `keep` leaves both alone, and is a choice everywhere."""
        calls, probes = (
            (pricing if estimator == "sweep" else parts),
            (options.probes if estimator == "probe" else 4),
        )
        return profile(
            model,
            graph,
            schemes,
            calls,
            estimator=estimator,
            probes=probes,
            weights=weights,
            seed=seed,
        )

    def planned(estimator: str, bits: float, **settings: Any) -> Plan:
        return allocate(graph, priced(estimator), Budget(average_bits=bits), **settings)

    def refined(bits: float) -> Plan:
        return refine(
            model,
            graph,
            planned("probe", bits),
            schemes,
            parts,
            weights=weights,
            rounds=options.rounds,
            probes=6,
            seed=seed,
        ).plan

    kinds: dict[str, Callable[[float], Plan | None]] = {
        "sweep": lambda bits: planned("sweep", bits),
        "probe": lambda bits: planned("probe", bits),
        "probe with interactions": lambda bits: planned("probe", bits, solver="local"),
        "probe, refined": refined,
        "sum of dB (MixDQ)": lambda bits: planned(
            "sweep", bits, objective=Objective(decibels=True)
        ),
        "fisher": lambda bits: planned("fisher", bits),
        "weight error": lambda bits: planned(
            "weight_error", bits, objective=Objective({"weight_error": 1.0})
        ),
        "weight error, normalised": lambda bits: planned(
            "weight_error", bits, objective=Objective({"relative_weight_error": 1.0})
        ),
        "uniform": best_uniform,
        f"best of {options.random} random": best_random,
    }
    for bits, (whose, made) in itertools.product(options.budgets, kinds.items()):
        if (bits, whose) not in done and (plan := made(bits)) is not None:
            yield bits, whose, plan, measure
    for scheme in dict.fromkeys(
        [
            *(rounded(s, options.activation) for s in PLAIN),
            *(s for s in schemes if Scheme.parse(s).bits == 4),
        ]
    ):
        plan = Plan.uniform(graph, scheme)
        if (plan.achieved.average_bits, f"uniform {scheme}") not in done:
            yield plan.achieved.average_bits, f"uniform {scheme}", plan, measure


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean over the seeds and its standard error of every plan's SQNR; what is measured is kept in
    plansNAME.partial.json.
    """
    partial = HERE / f"plans{options.name}.partial.json"
    asked = json.loads(
        json.dumps(
            {
                k: v
                for k, v in vars(options).items()
                if k not in ("parts", "reference", "models", "seeds", "name")
            }
        )
    )
    known = json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}
    found: dict[str, Any] = known.get("found", {}) if known.get("asked") == asked else {}
    whole: list[str] = known.get("whole", []) if found else []
    for seed, name in itertools.product(range(options.seeds), options.models):
        if (key := f"{name} {seed}") in whole:
            continue
        mine = found.setdefault(key, [])
        for bits, whose, plan, measure in plans_of(
            name, seed, options, {(bits, whose) for bits, whose, *_ in mine}
        ):
            mine.append([bits, whose, plan.achieved.average_bits, measure(plan)])
            partial.write_text(
                json.dumps({"asked": asked, "found": found, "whole": whole}), encoding="utf-8"
            )
        whole.append(key)
        partial.write_text(
            json.dumps({"asked": asked, "found": found, "whole": whole}), encoding="utf-8"
        )
        print(f"{key}: {len(mine)} plans", flush=True)
    rows = []
    for name in options.models:
        cells: dict[tuple[float, str], list[tuple[float, float]]] = {}
        for seed in range(options.seeds):
            for bits, whose, stored, decibels in found[f"{name} {seed}"]:
                cells.setdefault((bits, whose), []).append((stored, decibels))
        for (bits, whose), seen in sorted(cells.items()):
            decibels = np.array([d for _, d in seen])
            error = (
                float(decibels.std(ddof=1) / math.sqrt(len(seen))) if len(seen) > 1 else math.inf
            )
            stored = sum(s for s, _ in seen) / len(seen)
            rows.append(
                {
                    "model": name,
                    "budget": bits,
                    "plan": whose,
                    "stored bits": stored,
                    "SQNR, dB": float(decibels.mean()),
                    "±": error,
                }
            )
        draw(name + options.name, [row for row in rows if row["model"] == name], options.budgets)
    return rows


def draw(name: str, rows: list[dict[str, Any]], budgets: tuple[float, ...]) -> None:
    """Size against measured SQNR, a line a kind of plan, with error bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    ax = figure.add_subplot()
    kinds = sorted({row["plan"] for row in rows})
    for kind in kinds:
        mine = [row for row in rows if row["plan"] == kind]
        x, y, error = ([row[k] for row in mine] for k in ("stored bits", "SQNR, dB", "±"))
        ours = kind.startswith(("sweep", "probe"))
        lone = not any(row["budget"] in budgets for row in mine)
        ax.errorbar(
            x,
            y,
            [0.0 if math.isinf(e) else e for e in error],
            fmt="s" if lone else "o-" if ours else "x--",
            capsize=3,
            label=kind,
            linewidth=1.8 if ours else 1,
        )
    ax.set(
        xlabel="stored bits a weight",
        ylabel="SQNR of the denoiser's output on unseen calls, dB",
        title=name,
    )
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(HERE / f"plans-{name}.png", dpi=130)


def main() -> None:
    """Do the parts that are asked for and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=("reference", "frontier", "measured"))
    beside = Path(__file__).parents[2].parent / "shared" / "reference"
    parser.add_argument(
        "--reference", type=Path, default=Path(os.environ.get("QSEARCH_REFERENCE", beside))
    )
    parser.add_argument("--name", default="", help="added to the names of what `measured` writes")
    parser.add_argument("--models", nargs="*", default=["scenes-dit", "scenes-unet"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument(
        "--activation",
        default="+a8",
        help="what every scheme does to its layer's input; '' leaves it alone",
    )
    parser.add_argument("--samples", type=int, default=4, help="captions that plans are made from")
    parser.add_argument("--unseen", type=int, default=8, help="captions that they are measured on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--bins", type=int, default=2)
    parser.add_argument("--probes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--random", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.name = "-" * bool(options.name) + options.name
    done: dict[str, list[dict[str, Any]]] = {}
    if "reference" in options.parts:
        done["MixDQ's published plans"] = reference(options.reference)
    if "frontier" in options.parts:
        done["time of plans"] = timing(options.seed)
    if "measured" in options.parts:
        done[f"measured on {', '.join(options.models)}, {options.seeds} seeds"] = measured(options)
    earlier = HERE / "plans.json"
    kept = (
        json.loads(earlier.read_text(encoding="utf-8")).get("parts", {}) if earlier.exists() else {}
    )
    for title, rows in done.items():
        kept[title.split(",")[0] + options.name if title.startswith("measured") else title] = rows
        publish(__file__, rows, title=title, seed=options.seed, extra={"parts": kept})


if __name__ == "__main__":
    main()
