"""Attentions as choices of the plan: prices against the sweep, predictions of mixed plans, plans at
equal FLOPs.

    python notebooks/figures/attention_plans.py --zoo scenes-dit --part price
    python notebooks/figures/attention_plans.py --zoo scenes-dit --part sweep [--cells 64]
    python notebooks/figures/attention_plans.py --zoo scenes-dit --part mixed [--plans 100]
    python notebooks/figures/attention_plans.py --zoo scenes-dit --part equal [--evaluations 96]

`price` profiles once, through the whole sampler, and leaves the table in the folder that `--work`
names; the others read it. `--captions`, `--probes`: of each part. 20 steps with guidance in four
ranges; every choice begins each range, or the sampling, with a dense step. `sweep`: a choice at one
attention in one range, drawn at random, its measured error of the final latents against its price.
`mixed`: random weights, inputs and attentions in each range, predicted error against measured.
`equal`: our plans at 1/2, 1/4, 1/8 and 1/16 of the FLOPs of dense self-attentions against the best
of all single settings that take no more, on other captions: by the integer program and the local
search over prices, and by a schedule that is searched in `--evaluations` samplings of the captions
of the prices, where the best of these settings is found too. Each part writes
attention_plans-ZOO-PART.json.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figure import publish
from scipy.stats import spearmanr
from torch import Tensor
from worlds import prompts_of, sampling_of

from qsearch import zoo
from qsearch.core.attentions import attention_share
from qsearch.core.cost import Budget
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.steps import StepRanges
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.decide.schedules import search_schedule
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import (
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
    sample,
)
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate

STEPS, RANGES = 20, 4
LAYERS = ("uint3-c", "uint4-c", "uint8-c", "uint4-c+a8", "uint8-c+a6")
KINDS = ("window4", "window8", "window16")
METHODS = ("", "~rho", "~residual", "~rettention")
CACHED = ("dense~cached", "dense~cached~every10", "dense~cached~every20")
LONG = (
    "window16~residual~every10",
    "window32~residual~every20",
    "window32~rettention~every20",
    "window8~rettention~drift0.04",
)
CHOICES = (*(k + m for k in KINDS for m in METHODS), *CACHED, *LONG)


class Case:
    """A model of the zoo with its graph, and captions to price on and to measure on."""

    def __init__(self, name: str, captions: int) -> None:
        self.name, self.captions = name, captions
        self.pipe = load_pipeline(zoo.folder(name))
        self.model = model_of(self.pipe)
        call, *_ = record(self.pipe, prompts_of(name, 1, 0), self.sampling(0), 1)
        self.graph = extract(self.model, example_inputs(call, self.model), name=name)
        self.weights = QuantizedWeights(self.model, self.graph)

    def sampling(self, seed: int) -> Sampling:
        """20 guided steps."""
        return sampling_of(self.name, STEPS, seed=seed, batch=self.captions)

    def sampled(self, seed: int, plan: Plan | dict[str, Scheme] | None = None) -> Tensor:
        """Final latents of the captions of a seed, by a plan."""
        prompts = prompts_of(self.name, self.captions, seed)
        if plan is None:
            return sample(self.pipe, prompts, self.sampling(seed))
        with simulate(self.model, plan, self.graph, self.weights):
            return sample(self.pipe, prompts, self.sampling(seed))


def errors(made: Tensor, reference: Tensor) -> Tensor:
    """Squared error over squared reference [N]."""
    off = (made - reference).double().flatten(1).square().sum(1)
    return off / reference.double().flatten(1).square().sum(1)


def _in_range(index: int, pair: dict[str, Any]) -> bool:
    return bool(pair["range"] == index)


def decibels(error: Tensor) -> tuple[float, float]:
    """SQNR of the mean error, and its standard error over captions."""
    mean = float(error.mean())
    spread = float(error.std() / math.sqrt(len(error)))
    return -10 * math.log10(mean), 10 / math.log(10) * spread / mean


def priced(graph: OpGraph) -> tuple[str, ...]:
    """The choices that some attention can have."""
    from qsearch.core.attentions import fault_of

    specs = graph.self_attentions.values()
    return tuple(c for c in CHOICES if any(not fault_of(s, Scheme.parse(c)) for s in specs))


def price(case: Case, table_path: Path, probes: int) -> None:
    began, cpu = time.monotonic(), time.process_time()
    table = profile_pipeline(
        case.pipe,
        case.graph,
        prompts_of(case.name, case.captions, 1),
        case.sampling(1),
        schemes=LAYERS,
        attentions=priced(case.graph),
        attention_ranges=RANGES,
        mode="trajectory",
        metrics=("sqnr",),
        probes=probes,
        batch=2,
    )
    table.save(table_path)
    rows = []
    spec = next(iter(case.graph.self_attentions.values()))
    for choice in priced(case.graph):
        mine = table.frame[table.frame["scheme"] == choice]
        share = attention_share(spec, Scheme.parse(choice))
        mean = float(mine["estimate"].mean())
        rows.append(
            {
                "choice": choice,
                "FLOPs of dense %": 100 * share,
                "mean SQNR alone, dB": -10 * math.log10(mean) if mean > 0 else math.inf,
                "worst attention": -10 * math.log10(float(mine["estimate"].max())),
            }
        )
    took = {"seconds": time.monotonic() - began, "CPU s": time.process_time() - cpu}
    show(case, "price", rows, "what each choice costs at one attention alone, by probes", took)


def sweep(case: Case, table: SensitivityTable, cells: int) -> None:
    """On the captions of the prices: a choice at one attention in one range of steps, drawn at
    random, as many in each range.
    """
    dice, reference = random.Random(0), case.sampled(1)
    sites = [spec.site for spec in case.graph.self_attentions.values()]
    steps = StepRanges.equal(RANGES).counted(STEPS)
    pairs: list[dict[str, Any]] = []
    for place in range(RANGES):
        every = [(site, choice) for site in sites for choice in priced(case.graph)]
        for site, choice in dice.sample(every, min(cells // RANGES, len(every))):
            layers: dict[str, Any] = {x.name: "keep" for x in case.graph}
            layers[site] = [choice if i == place else "keep" for i in range(RANGES)]
            plan = Plan.make(case.graph, layers, steps=steps)
            made = case.sampled(1, plan)
            measured = float((made - reference).square().sum() / reference.square().sum())
            price, _ = table.predict(plan, metric="sqnr")
            pairs.append(
                {
                    "range": place,
                    "site": site,
                    "choice": choice,
                    "price dB": -10 * math.log10(price),
                    "measured dB": -10 * math.log10(measured),
                }
            )
            print(pairs[-1], flush=True)
    parts: dict[str, Callable[[dict[str, Any]], bool]] = {
        f"steps {5 * i + 1} to {5 * i + 5}": partial(_in_range, i) for i in range(RANGES)
    }
    parts["all"] = lambda p: True
    parts["all above 10 dB"] = lambda p: p["measured dB"] > 10
    rows = []
    for name, inside in parts.items():
        mine = [p for p in pairs if inside(p)]
        prices, found = ([p[key] for p in mine] for key in ("price dB", "measured dB"))
        off = [a - b for a, b in zip(prices, found, strict=True)]
        rows.append(
            {
                "cells": name,
                "number": len(mine),
                "Spearman": float(spearmanr(prices, found)[0]),
                "median of measured, dB": statistics.median(found),
                "price - measured, dB": statistics.fmean(off),
            }
        )
    show(case, "sweep", rows, "prices of attentions against the sweep", {"pairs": pairs})


def mixed(case: Case, table: SensitivityTable, plans: int) -> None:
    """Random plans with one choice of weight and input a layer, and of attention a range, of which
    1 to 100 % are sparse: plans that hardly err and plans of which nothing is left.
    """
    dice, reference = random.Random(0), case.sampled(1)
    options = [*map(Scheme.parse, priced(case.graph))]
    steps, rows = StepRanges.equal(RANGES).counted(STEPS), []
    for number in range(plans):
        offered = dice.sample(LAYERS, 2)
        sparse = 10 ** dice.uniform(-2, 0)
        layers: dict[str, Any] = {
            x.name: dice.choice(offered) if x.quantizable else "keep" for x in case.graph
        }
        for spec in case.graph.self_attentions.values():
            layers[spec.site] = [
                dice.choice(options) if dice.random() < sparse else KEEP for _ in range(RANGES)
            ]
        plan = Plan.make(case.graph, layers, steps=steps)
        made = case.sampled(1, plan)
        measured = float((made - reference).square().sum() / reference.square().sum())
        together, alone = (
            table.predict(plan, metric="sqnr", interactions=i)[0] for i in (True, False)
        )
        rows.append(
            {
                "plan": number,
                "bits": plan.achieved.average_bits,
                "attention FLOPs %": 100 * plan.achieved.attention_share,
                "measured dB": -10 * math.log10(measured),
                "predicted dB": -10 * math.log10(together),
                "predicted by sums dB": -10 * math.log10(alone),
            }
        )
        print(rows[-1], flush=True)
    found = {
        name: float(spearmanr([r["measured dB"] for r in rows], [r[name] for r in rows])[0])
        for name in ("predicted dB", "predicted by sums dB", "bits", "attention FLOPs %")
    }
    print("Spearman with measured:", found)
    show(case, "mixed", rows, "random mixed plans, predicted and measured", {"spearman": found})


def equal(case: Case, table: SensitivityTable, evaluations: int) -> None:
    """Ours at each share against the best single setting, found on the captions of the prices,
    measured on others.
    """
    keep = {x.name: KEEP for x in case.graph}
    specs = list(case.graph.self_attentions.values())
    reference, other = case.sampled(1), case.sampled(2)
    known = dict[str, Tensor]()

    def measured(plan: Plan) -> Tensor:
        if plan.id not in known:
            known[plan.id] = errors(case.sampled(1, plan), reference)
        return known[plan.id]

    singles = {}
    for choice in priced(case.graph):
        plan = Plan.make(
            case.graph, keep | {s.site: choice for s in specs}, steps=StepRanges((), STEPS)
        )
        warmed = Plan.make(
            case.graph,
            keep | {s.site: ["keep", *[choice] * (RANGES - 1)] for s in specs},
            steps=StepRanges.equal(RANGES).counted(STEPS),
        )
        for name, one in ((choice, plan), (f"5 dense steps, then {choice}", warmed)):
            found = float(measured(one).mean())
            singles[name] = (one, found)
            print(name, one.achieved.attention_share, -10 * math.log10(found), flush=True)
    rows = []
    for parts in (2, 4, 8, 16):
        budget = Budget(average_bits=16, attention_share=1 / parts)
        candidates = [
            allocate(case.graph, table, budget, metric="sqnr", steps=StepRanges.equal(n), solver=s)
            for n in (1, RANGES)
            for s in ("ilp", "local")
        ]
        priced_best = min(candidates, key=lambda p: float(measured(p).mean()))
        searched = search_schedule(
            case.graph,
            Plan.uniform(case.graph, KEEP),
            priced(case.graph),
            lambda plan: measured(plan).numpy(),
            steps=STEPS,
            budget=budget,
            evaluations=evaluations,
        )
        ours = min((priced_best, searched.plan), key=lambda p: float(measured(p).mean()))
        fitting = {n: v for n, v in singles.items() if v[0].achieved.attention_share <= 1 / parts}
        if not fitting:
            continue
        best = min(fitting, key=lambda n: fitting[n][1])
        mine, theirs, summed = (
            errors(case.sampled(2, p), other) for p in (ours, fitting[best][0], priced_best)
        )
        gain = 10 * torch.log10(theirs / mine)
        rows.append(
            {
                "FLOPs at most": f"1/{parts}",
                "ours dB": decibels(mine)[0],
                "± ours": decibels(mine)[1],
                "found by": "schedule" if ours.id == searched.plan.id else "prices",
                "ranges": len(ours.steps),
                "its FLOPs %": 100 * ours.achieved.attention_share,
                "by prices alone dB": decibels(summed)[0],
                "best single setting": best,
                "dB": decibels(theirs)[0],
                "± its": decibels(theirs)[1],
                "FLOPs %": 100 * fitting[best][0].achieved.attention_share,
                "gain a caption dB": float(gain.mean()),
                "± gain": float(gain.std() / math.sqrt(len(gain))),
            }
        )
        print(rows[-1], {s.site: ours.text(s.site) for s in specs}, flush=True)
    show(case, "equal", rows, "final latents at equal FLOPs of self-attention", {})


def show(
    case: Case, part: str, rows: list[dict[str, Any]], title: str, extra: dict[str, Any]
) -> None:
    script = str(Path(__file__).with_name(f"attention_plans-{case.name}-{part}.py"))
    said = f"{case.name}, {case.captions} captions, {STEPS} steps: {title}"
    publish(script, rows, title=said, seed=0, extra=extra)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit")
    parser.add_argument("--part", choices=["price", "sweep", "mixed", "equal"], required=True)
    parser.add_argument("--work", type=Path, default=Path())
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--evaluations", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(options.zoo, options.captions)
    path = options.work / f"{options.zoo}.parquet"
    if options.part == "price":
        price(case, path, options.probes)
    else:
        table = SensitivityTable.load(path, case.graph.id)
        if options.part == "sweep":
            sweep(case, table, options.cells)
        elif options.part == "mixed":
            mixed(case, table, options.plans)
        else:
            equal(case, table, options.evaluations)
