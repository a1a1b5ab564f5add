"""allocate(graph, table, budget) -> BitPlan: the best plan a solver finds, priced again and refused if it breaks its budget."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core import plugins
from ..core.errors import InfeasibleBudget, QSearchError
from ..core.graph import OpGraph
from ..core.interactions import scores_of
from ..core.latency import Latency
from ..core.plan import BitPlan, Budget, Solver
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from .building import Scores, bills, limits_of, make_problem
from .constraints import Constraints
from .frontier import frontier
from .objectives import Objective, Values
from .problem import Choice, Problem, Vector


def state(
    graph: OpGraph,
    table: SensitivityTable | Values,
    budget: Budget,
    *,
    metric: str = "noise",
    objective: Objective | None = None,
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    schemes: Sequence[Scheme | str] | None = None,
    scores: Scores | None = None,
    trust: float | None = None,
) -> Problem:
    """The problem that `allocate` solves: a table (or losses that somebody predicts, layer -> scheme -> loss) and an objective made into values.

    `objective` says more than `metric` can: weights, limits on losses, decibels; it needs a table. `scores` and `trust`: interactions, as in
    `make_problem`; they need a solver that knows them, `local`.
    """
    asked = objective or Objective({metric: 1.0})
    if isinstance(table, SensitivityTable):
        table.check(graph)
        values: Values = asked.values(table)
        at_most = asked.limits(table)
    elif objective is None:
        values, at_most = table, {}
    else:
        raise QSearchError(
            "an objective of several metrics needs a sensitivity table; losses by layer and scheme are one metric already"
        )
    rules: dict[str, Any] = {"constraints": constraints, "latency": latency, "schemes": schemes}
    return make_problem(graph, values, budget, at_most=at_most, scores=scores, trust=trust, **rules)


def allocate(
    graph: OpGraph,
    table: SensitivityTable | Values,
    budget: Budget,
    *,
    solver: str = "ilp",
    metric: str = "noise",
    objective: Objective | None = None,
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    schemes: Sequence[Scheme | str] | None = None,
    scores: Scores | None = None,
    trust: float | None = None,
    evaluate: Callable[[BitPlan], float] | None = None,
    seconds: float = 60.0,
) -> BitPlan:
    """Plan for `graph` within `budget`, of least total loss by the table. Arguments as in `state`; `seconds` is the solver's time limit.

    A solver that minimises the total with interactions (`local`) takes them from a table that was made by probes, where `scores` are not given.
    `evaluate`: plan -> its measured loss, for a solver that searches on real evaluations (`tpe`, `nsga2`), begun at the table's best plans.

    Raises `InfeasibleBudget` with the best reachable, or with the pair of limits that contradict each other, when no plan fits. The solver's
    claim is not believed: `BitPlan.make` prices the plan.
    """
    rules: dict[str, Any] = {
        "metric": metric,
        "objective": objective,
        "constraints": constraints,
        "latency": latency,
        "schemes": schemes,
    }
    plugin, options = plugins.load("solvers", solver), {}
    if (
        scores is None
        and plugin.quadratic
        and isinstance(table, SensitivityTable)
        and table.shares is not None
        and not (objective and objective.decibels)
    ):
        scores = scores_of(table.shares, objective.weights if objective else {metric: 1.0})
    problem = state(graph, table, budget, scores=scores, trust=trust, **rules)
    began = time.monotonic()
    solve = plugin.solve
    if evaluate is not None:
        if "evaluate" not in inspect.signature(solve).parameters:
            raise QSearchError(
                f"{solver} takes the table's word and evaluates nothing; give tpe or nsga2, or leave evaluate out"
            )
        unsolved = Solver(solver, "unsolved")
        options["evaluate"] = lambda chosen: evaluate(
            finish(graph, problem, chosen, unsolved, budget, latency)
        )
    chosen, said = solve(problem, seconds=seconds, **options)
    return finish(
        graph,
        problem,
        chosen,
        replace(said, seconds=round(time.monotonic() - began, 3)),
        budget,
        latency,
        measured=evaluate is not None,
    )


def finish(
    graph: OpGraph,
    problem: Problem,
    chosen: Mapping[str, Choice],
    said: Solver,
    budget: Budget,
    latency: Latency | None = None,
    *,
    measured: bool = False,
) -> BitPlan:
    """A solver's assignment as a plan, priced by `core/plan.py`; its objective is added up again, but where it was `measured`."""
    layers = {
        name: choice
        for name, choice in problem.layers(chosen).items()
        if isinstance(choice, Scheme)
    }
    fixed = {layer.name: KEEP for layer in graph if not layer.quantizable}
    return BitPlan.make(
        graph,
        layers | fixed,
        budget,
        said if measured else replace(said, objective=problem.total(chosen)),
        latency=latency,
    )


def allocate_frontier(
    graph: OpGraph,
    table: SensitivityTable | Values,
    average_bits: Sequence[float],
    *,
    budget: Budget | None = None,
    solver: str = "lagrangian",
    metric: str = "noise",
    objective: Objective | None = None,
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    schemes: Sequence[Scheme | str] | None = None,
    seconds: float = 60.0,
) -> list[BitPlan]:
    """A plan for each of `average_bits` that can be reached, the other limits of `budget` kept. Raises `InfeasibleBudget` where none can."""
    budgets = [
        replace(budget, average_bits=bits) if budget else Budget(average_bits=bits)
        for bits in average_bits
    ]
    if not budgets:
        raise QSearchError("a frontier needs at least one budget")
    loosest = max(budgets, key=lambda b: b.average_bits or 0.0)
    problem = state(
        graph,
        table,
        loosest,
        metric=metric,
        objective=objective,
        constraints=constraints,
        latency=latency,
        schemes=schemes,
    )
    limits = [bits - problem.spent["average_bits"] for bits in average_bits]
    plans, refused = [], []
    for asked, answer in zip(
        budgets,
        frontier(problem, "average_bits", limits, solver=solver, seconds=seconds),
        strict=True,
    ):
        if isinstance(answer, InfeasibleBudget):
            refused.append(answer)
        else:
            plans.append(finish(graph, problem, *answer, asked, latency))
    if not plans:
        raise refused[-1]
    return plans


def random_plan(
    graph: OpGraph,
    schemes: Sequence[Scheme | str],
    budget: Budget,
    seed: int,
    *,
    latency: Latency | None = None,
) -> BitPlan:
    """A random plan that fills the budget: random schemes, then random layers made cheaper or dearer until nothing more fits.

    What a search without information would give at this size; the baseline beside the uniform plan. Raises `InfeasibleBudget` where the
    cheapest schemes are too dear.
    """
    dice = random.Random(seed)
    options = [Scheme.parse(s) for s in schemes]
    layers = graph.quantizable
    kept = {layer.name: KEEP for layer in graph if not layer.quantizable}
    priced = bills(graph, budget, latency)
    limits = np.array(
        [
            limit - sum(priced[name](graph.layer(x), KEEP) for x in kept)
            for name, limit in limits_of(budget).items()
        ]
    )
    if latency is not None and "latency" in priced:
        limits[list(priced).index("latency")] -= latency.rest
    prices = {
        layer.name: np.array([[bill(layer, s) for bill in priced.values()] for s in options])
        for layer in layers
    }
    ladder = {
        layer.name: sorted(range(len(options)), key=prices[layer.name][:, 0].__getitem__)
        for layer in layers
    }
    rung = {layer.name: dice.randrange(len(options)) for layer in layers}

    def step(name: str, by: int) -> Vector:
        extra: Vector = (
            prices[name][ladder[name][rung[name] + by]] - prices[name][ladder[name][rung[name]]]
        )
        return extra

    def fits(spent: Vector) -> bool:
        return bool((spent <= limits * (1 + 1e-12)).all())

    spent = sum((prices[n][ladder[n][r]] for n, r in rung.items()), np.zeros(len(limits)))
    down = [n for n, r in rung.items() for _ in range(r)]
    dice.shuffle(down)
    for name in down:
        if fits(spent):
            break
        spent += step(name, -1)
        rung[name] -= 1
    up = [n for n, r in rung.items() for _ in range(len(options) - 1 - r)]
    dice.shuffle(up)
    for name in up:
        if rung[name] + 1 < len(options) and fits(spent + step(name, 1)):
            spent += step(name, 1)
            rung[name] += 1
    chosen = {n: options[ladder[n][r]] for n, r in rung.items()}
    return BitPlan.make(graph, chosen | kept, budget, Solver("random", "unsolved"), latency=latency)
