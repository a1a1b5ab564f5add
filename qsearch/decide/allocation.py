"""allocate(graph, table, budget) -> BitPlan: the best plan a solver finds, priced again and refused if it breaks its budget."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from ..core import plugins
from ..core.graph import OpGraph
from ..core.plan import BitPlan, Budget, Solver
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from .problem import make_problem


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

    What a search without information would give at this size; the baseline beside the uniform plan. Needs a limit on average bits.
    """
    dice = random.Random(seed)
    options = [Scheme.parse(s) for s in schemes]
    layers = graph.quantizable
    prices = {layer.name: [s.stored_bits(layer.weight_shape, layer.channel_axis) for s in options] for layer in layers}
    ladder = {layer.name: sorted(range(len(options)), key=prices[layer.name].__getitem__) for layer in layers}
    rung = {layer.name: dice.randrange(len(options)) for layer in layers}
    limit = (budget.average_bits or 0.0) * graph.weights - sum(16 * layer.weights for layer in graph if not layer.quantizable)

    def price(name: str, at: int) -> int:
        return prices[name][ladder[name][at]]

    spent = sum(price(n, r) for n, r in rung.items())
    down = [n for n, r in rung.items() for _ in range(r)]
    dice.shuffle(down)
    for name in down:
        if spent <= limit:
            break
        spent += price(name, rung[name] - 1) - price(name, rung[name])
        rung[name] -= 1
    up = [n for n, r in rung.items() for _ in range(len(options) - 1 - r)]
    dice.shuffle(up)
    for name in up:
        if rung[name] + 1 < len(options):
            extra = price(name, rung[name] + 1) - price(name, rung[name])
            if spent + extra <= limit:
                spent, rung[name] = spent + extra, rung[name] + 1
    chosen = {n: options[ladder[n][r]] for n, r in rung.items()} | {layer.name: KEEP for layer in graph if not layer.quantizable}
    return BitPlan.make(graph, chosen, budget, Solver("random", "unsolved"))
