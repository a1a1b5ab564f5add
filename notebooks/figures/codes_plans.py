"""Trellis codes, rotations and low-rank branches as choices of plans, beside the choices of before.

    python notebooks/figures/codes_plans.py --zoo scenes-dit --part weights [--seeds 2]
    python notebooks/figures/codes_plans.py --zoo scenes-dit --part inputs

`weights`: the best plan at each budget of stored bits among integers with GPTQ, k-means and small
floats, and among these and trellis codes of 2, 3 and 4 bits, rotated and not. `inputs`: inputs of 4
bits, one recipe for all layers (first and last kept), and plans that mix all of them within the bit
operations of the plain recipe; W3A4 beside. SQNR of the denoiser's output in dB on calls that no
plan was made from (8 captions, 3 steps), by seeds of captions and noise, for pricing and measuring
alike. Each part writes codes_plans-ZOO-PART.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figure import publish

from qsearch import zoo
from qsearch.core.cost import Budget, can_have
from qsearch.core.errors import InfeasibleBudget
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.decide.allocation import allocate
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import (
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
    run,
    scene_prompts,
)
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights, calibrated_weights
from qsearch.measure.simulation import simulate

BEFORE = (
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
CODES = (
    "tcq2-c~rotate@ldlq",
    "tcq3-c~rotate@ldlq",
    "tcq4-c~rotate@ldlq",
    "tcq2-c@ldlq",
    "tcq3-c@ldlq",
    "tcq4-c@ldlq",
)
BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0)
UNIFORM = ("uint4-c@gptq", "uint3-c@gptq", "tcq3-c~rotate@ldlq", "tcq2-c~rotate@ldlq")
W4A4 = (
    "int4-g64+a4",
    "int4-g64+a4@gptq",
    "int4-g64+a4~balance50@gptq",
    "int4-g64+a4~rotate@gptq",
    "int4-g64+a4~balance50~rotate@gptq",
    "int4-g64+a4~lowrank16@gptq",
    "int4-g64+a4~lowrank32@gptq",
    "int4-g64+a4~rotate~lowrank16@gptq",
    "int4-g64+a4~rotate~lowrank32@gptq",
    "tcq4-c+a4~rotate@ldlq",
    "tcq3-c+a4~rotate@ldlq",
    "tcq2-c+a4~rotate@ldlq",
)
#: cheaper and dearer inputs and weights, between which a mixed plan trades
MORE = ("int4-g64+a6~rotate@gptq", "tcq2-c+a8~rotate@ldlq", "uint8-c+a8", "int8-c+a4~rotate")


class Seed:
    """Recorded calls of a seed: some to price and calibrate on, others to measure on."""

    def __init__(self, name: str, seed: int, schemes: Sequence[str]) -> None:
        self.pipe = load_pipeline(zoo.folder(name))
        self.model = model_of(self.pipe)
        first, second = (
            record(
                self.pipe,
                scene_prompts(8, seed=1000 * seed + part),
                Sampling(steps=20, seed=1000 * seed + part, batch=8),
                bins=3,
                batch=2 if part == 0 else 8,
            )
            for part in (0, 1)
        )
        self.priced, self.unseen = first, second
        self.graph = extract(self.model, example_inputs(first[0], self.model), name=name)
        wanted = {
            x.name: [s for s in map(Scheme.parse, schemes) if can_have(x, s)]
            for x in self.graph.quantizable
        }
        self.weights: QuantizedWeights = calibrated_weights(
            self.model, self.graph, wanted, self.priced
        )
        self.reference = [run(self.model, call) for call in self.unseen]

    def table(self, schemes: Sequence[str], seed: int) -> Any:
        return profile(
            self.model,
            self.graph,
            schemes,
            self.priced,
            probes=12,
            seed=seed,
            weights=self.weights,
        )

    def decibels(self, plan: Plan) -> float:
        with simulate(self.model, plan, self.graph, self.weights):
            made = [run(self.model, call) for call in self.unseen]
        pairs = list(zip(made, self.reference, strict=True))
        noise = sum(float((a - b).square().sum()) for a, b in pairs)
        return 10 * math.log10(sum(float(b.square().sum()) for _, b in pairs) / noise)

    def uniform(self, scheme: str, *, ends: bool = False) -> Plan:
        """One scheme everywhere; `ends`: but for the first and the last layer."""
        plan = Plan.uniform(self.graph, scheme)
        kept = {x.name: KEEP for x in self.graph if ends and x.role in ("input", "output")}
        return plan.replaced(self.graph, kept) if kept else plan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, spread / math.sqrt(len(values))


def weights(name: str, seeds: int) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        began = time.process_time()
        case = Seed(name, seed, (*BEFORE, *CODES))
        table = case.table((*BEFORE, *CODES), seed)
        for budget in BUDGETS:
            for kind, schemes in (("before", BEFORE), ("with codes", (*BEFORE, *CODES))):
                try:
                    plan = allocate(case.graph, table, Budget(average_bits=budget), schemes=schemes)
                except InfeasibleBudget:
                    continue
                row = found.setdefault(f"{budget:.2f} bits", {})
                row.setdefault(kind, []).append(case.decibels(plan))
        for scheme in UNIFORM:
            plan = case.uniform(scheme)
            row = found.setdefault(f"uniform {scheme}, {plan.achieved.average_bits:.2f} bits", {})
            row.setdefault("before" if scheme in BEFORE else "with codes", []).append(
                case.decibels(plan)
            )
        print(name, seed, found, time.process_time() - began, flush=True)
    rows = []
    for title, row in found.items():
        line: dict[str, Any] = {"plan": title}
        for kind in ("before", "with codes"):
            mean, error = mean_and_error(row[kind]) if kind in row else (math.nan, math.nan)
            line |= {f"{kind} dB": mean, f"± {kind}": error}
        line["gain dB"] = line["with codes dB"] - line["before dB"]
        rows.append(line)
    show(name, "weights", rows, f"plans with and without codes near the limit, {seeds} seeds")


def inputs(name: str, seeds: int) -> None:
    schemes = (*W4A4, *MORE)
    found: dict[str, list[float]] = {}
    costs: dict[str, tuple[float, float]] = {}
    for seed in range(seeds):
        began = time.process_time()
        case = Seed(name, seed, schemes)
        plain = case.uniform(W4A4[0], ends=True).achieved
        plans = {scheme: case.uniform(scheme, ends=True) for scheme in W4A4}
        table = case.table(schemes, seed)
        ends = {x.name: ("keep",) for x in case.graph if x.role in ("input", "output")}
        tries = {
            "mixed, bit operations of plain W4A4": Budget(bit_operations=plain.bit_operations),
            "mixed, and at most 4.5 stored bits": Budget(
                bit_operations=plain.bit_operations, average_bits=4.5
            ),
            "mixed, bit operations of W3A4, at most 4.0 stored bits": Budget(
                bit_operations=0.8 * plain.bit_operations, average_bits=4.0
            ),
        }
        for title, budget in tries.items():
            try:
                plans[title] = allocate(case.graph, table, budget, constraints=_kept(tuple(ends)))
            except InfeasibleBudget as error:
                print(title, error, flush=True)
        for title, plan in plans.items():
            found.setdefault(title, []).append(case.decibels(plan))
            ratio = plan.achieved.bit_operations / plain.bit_operations
            costs[title] = plan.achieved.average_bits, ratio
        print(name, seed, found, time.process_time() - began, flush=True)
    rows = []
    base = mean_and_error(found[W4A4[0]])[0]
    for title, values in found.items():
        mean, spread = mean_and_error(values)
        bits, work = costs[title]
        rows.append(
            {
                "plan": title,
                "stored bits": bits,
                "bit operations of plain": work,
                "dB": mean,
                "±": spread,
                "over plain dB": mean - base,
            }
        )
    show(name, "inputs", rows, f"inputs of 4 bits, first and last layer kept, {seeds} seeds")


def _kept(names: tuple[str, ...]) -> Any:
    from qsearch.decide.constraints import Constraints

    return Constraints(protected=names)


def show(name: str, part: str, rows: list[dict[str, Any]], title: str) -> None:
    script = str(Path(__file__).with_name(f"codes_plans-{name}-{part}.py"))
    publish(script, rows, title=f"{name}: {title}", seed=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit")
    parser.add_argument("--part", choices=["weights", "inputs"], required=True)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (weights if options.part == "weights" else inputs)(options.zoo, options.seeds)
