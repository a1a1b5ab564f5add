"""allocate(graph, table, budget) -> BitPlan: the best plan a solver finds, priced again and refused if it breaks its budget."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..core import plugins
from ..core.graph import OpGraph
from ..core.plan import BitPlan, Budget, Solver
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from .problem import Vector, make_problem, price


def allocate(
    graph: OpGraph,
    table: SensitivityTable,
    budget: Budget,
    *,
    solver: str = "ilp",
    metric: str = "noise",
    schemes: Sequence[Scheme | str] | None = None,
    seconds: float = 60.0,
) -> BitPlan:
    """Plan for `graph` within `budget`, of least total `metric` by the table.

    Raises `InfeasibleBudget` with the best reachable when no plan fits. The solver's claim is not believed: `BitPlan.make` prices the plan.
    """
    problem = make_problem(graph, table, budget, metric=metric, schemes=schemes)
    began = time.monotonic()
    chosen, said = plugins.load("solvers", solver).solve(problem, seconds=seconds)
    said = replace(said, objective=problem.total(chosen), seconds=round(time.monotonic() - began, 3))
    fixed = {layer.name: KEEP for layer in graph if not layer.quantizable}
    return BitPlan.make(graph, chosen | fixed, budget, said)


def random_plan(graph: OpGraph, schemes: Sequence[Scheme | str], budget: Budget, seed: int) -> BitPlan:
    """A random plan that fills the budget: random schemes, then random layers made cheaper or dearer until nothing more fits.

    What a search without information would give at this size; the baseline beside the uniform plan. Raises `InfeasibleBudget` where the
    cheapest schemes are too dear.
    """
    dice = random.Random(seed)
    options = [Scheme.parse(s) for s in schemes]
    layers = graph.quantizable
    kept = {layer.name: KEEP for layer in graph if not layer.quantizable}
    units = {"average_bits": graph.weights, "bytes": 8, "bit_operations": 1}
    limits = np.array([limit * units[name] - price(graph, name, kept) for name, limit in budget.limits.items()])
    prices = {layer.name: np.array([[price(graph, name, {layer.name: s}) for name in budget.limits] for s in options]) for layer in layers}
    ladder = {layer.name: sorted(range(len(options)), key=prices[layer.name][:, 0].__getitem__) for layer in layers}
    rung = {layer.name: dice.randrange(len(options)) for layer in layers}

    def step(name: str, by: int) -> Vector:
        extra: Vector = prices[name][ladder[name][rung[name] + by]] - prices[name][ladder[name][rung[name]]]
        return extra

    spent = sum((prices[n][ladder[n][r]] for n, r in rung.items()), np.zeros(len(limits)))
    down = [n for n, r in rung.items() for _ in range(r)]
    dice.shuffle(down)
    for name in down:
        if (spent <= limits).all():
            break
        spent += step(name, -1)
        rung[name] -= 1
    up = [n for n, r in rung.items() for _ in range(len(options) - 1 - r)]
    dice.shuffle(up)
    for name in up:
        if rung[name] + 1 < len(options) and (spent + step(name, 1) <= limits).all():
            spent += step(name, 1)
            rung[name] += 1
    chosen = {n: options[ladder[n][r]] for n, r in rung.items()}
    return BitPlan.make(graph, chosen | kept, budget, Solver("random", "unsolved"))
