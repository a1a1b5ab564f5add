"""allocate(graph, table, budget) -> Plan: the best plan a solver finds, priced again and refused if
it breaks its budget.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..core import plugins
from ..core.cost import Budget, can_have
from ..core.errors import InfeasibleBudget, QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.plan import ONE_RANGE, Plan, Solver
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from .building import costs_of, limits_of, make_problem
from .frontier import frontier
from .objectives import Values
from .problem import Choice, Problem, Vector
from .ranges import range_scores, ranges_of
from .request import AllocationRequest, requested


def state(
    graph: OpGraph,
    table: SensitivityTable | Values,
    budget: Budget,
    request: AllocationRequest | None = None,
    **named: Any,
) -> Problem:
    """The problem that `allocate` solves: a table and an objective made into values.

    Args:
        graph: the model's graph.
        table: a table, or losses that a surrogate predicts (layer -> scheme -> loss).
        budget: what a plan must keep.
        request: objective, constraints, choices; interactions (`scores`, `trust`) as in
            `make_problem` need a solver that takes them, `local`.
        named: fields of the request by their names.

    Returns:
        The problem.

    Raises:
        QSearchError: for an objective of several metrics without a table.
    """
    asked, ranges = requested(request, named), None
    if isinstance(table, SensitivityTable):
        table.check(graph)
        values: Values = asked.minimised.values(table)
        at_most = asked.minimised.limits(table)
        ranges = ranges_of(table, asked.minimised, asked.steps or ONE_RANGE, asked.share)
    elif asked.objective is None:
        values, at_most = table, {}
    else:
        raise QSearchError(
            "an objective of several metrics needs a sensitivity table; losses by layer and scheme "
            "are one metric already"
        )
    if asked.ranged and ranges is None:
        raise QSearchError(
            "a plan over ranges of steps needs a sensitivity table, whose step bins say what each "
            "range loses"
        )
    return make_problem(graph, values, budget, asked, at_most=at_most, ranges=ranges)


def allocate(
    graph: OpGraph,
    table: SensitivityTable | Values,
    budget: Budget,
    request: AllocationRequest | None = None,
    **named: Any,
) -> Plan:
    """Plan for `graph` within `budget`, of least total loss by the table.

    A solver that minimises the total with interactions (`local`) takes them from a table that was
    made by probes, where `scores` are not given. `evaluate` is for a solver that searches on real
    evaluations (`tpe`, `nsga2`), begun at the table's best plans. The solver's claim is not
    believed: `Plan.make` prices the plan.

    Args:
        graph: the model's graph.
        table: a table, or losses that a surrogate predicts (layer -> scheme -> loss).
        budget: what the plan must keep.
        request: objective, constraints, latency table, choices, solver and its time limit.
        named: fields of the request by their names, e.g. `solver="greedy"`.

    Returns:
        The plan.

    Raises:
        InfeasibleBudget: with the best reachable, or the pair of limits that contradict each other.
        QSearchError: for a request that contradicts itself.
    """
    asked = requested(request, named)
    plugin, options = plugins.load("solvers", asked.solver), {}
    if asked.scores is None and plugin.quadratic and isinstance(table, SensitivityTable):
        steps = asked.steps or ONE_RANGE
        asked = replace(asked, scores=range_scores(table, asked.minimised, steps))
    problem = state(graph, table, budget, asked)
    began = time.monotonic()
    solve, evaluate, latency = plugin.solve, asked.evaluate, asked.latency
    if evaluate is not None:
        if "evaluate" not in inspect.signature(solve).parameters:
            raise QSearchError(
                f"{asked.solver} takes the table's word and evaluates nothing; give tpe or nsga2, "
                "or leave evaluate out"
            )
        unsolved = Solver(asked.solver, "unsolved")
        options["evaluate"] = lambda chosen: evaluate(
            finish(graph, problem, chosen, unsolved, budget, latency)
        )
    chosen, said = solve(problem, seconds=asked.seconds, **options)
    said = replace(said, seconds=round(time.monotonic() - began, 3))
    return finish(graph, problem, chosen, said, budget, latency, measured=evaluate is not None)


def finish(
    graph: OpGraph,
    problem: Problem,
    chosen: Mapping[str, Choice],
    said: Solver,
    budget: Budget,
    latency: Latency | None = None,
    *,
    measured: bool = False,
) -> Plan:
    """A solver's assignment as a plan, priced by `core/plan.py`; its objective is added up again,
    but where it was `measured`.
    """
    layers: dict[str, Choice] = dict(problem.layers(chosen))
    layers |= {layer.name: KEEP for layer in graph if not layer.quantizable}
    return Plan.make(
        graph,
        layers,
        budget,
        said if measured else replace(said, objective=problem.total(chosen)),
        steps=problem.steps,
        latency=latency,
    )


def allocate_frontier(
    graph: OpGraph,
    table: SensitivityTable | Values,
    average_bits: Sequence[float],
    budget: Budget | None = None,
    request: AllocationRequest | None = None,
    **named: Any,
) -> list[Plan]:
    """A plan for each of `average_bits` that can be reached, the other limits of `budget` kept.

    Args:
        graph: the model's graph.
        table: as in `allocate`.
        average_bits: stored bits a weight, a plan each.
        budget: other limits.
        request: as in `allocate`; by the solver `lagrangian` where none is named.
        named: fields of the request by their names.

    Returns:
        The plans.

    Raises:
        InfeasibleBudget: where none of the budgets can be reached.
    """
    asked = (request or AllocationRequest(solver="lagrangian")).with_named(named)
    budgets = [
        replace(budget, average_bits=bits) if budget else Budget(average_bits=bits)
        for bits in average_bits
    ]
    if not budgets:
        raise QSearchError("a frontier needs at least one budget")
    loosest = max(budgets, key=lambda b: b.average_bits or 0.0)
    problem = state(graph, table, loosest, asked)
    limits = [bits - problem.spent["average_bits"] for bits in average_bits]
    answers = frontier(problem, "average_bits", limits, solver=asked.solver, seconds=asked.seconds)
    plans, refused = [], []
    for one, answer in zip(budgets, answers, strict=True):
        if isinstance(answer, InfeasibleBudget):
            refused.append(answer)
        else:
            plans.append(finish(graph, problem, *answer, one, asked.latency))
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
) -> Plan:
    """A random plan that fills the budget: random schemes, then random layers made cheaper or
    dearer until nothing more fits.

    What a search without information would give at this size; the baseline beside the uniform plan.
    Raises `InfeasibleBudget` where the cheapest schemes are too dear.
    """
    dice = random.Random(seed)
    options = [Scheme.parse(s) for s in schemes]
    layers = graph.quantizable
    kept = {layer.name: KEEP for layer in graph if not layer.quantizable}
    priced = costs_of(graph, budget, ONE_RANGE, latency)
    limits = np.array(
        [
            limit - sum(priced[name](graph.layer(x), KEEP) for x in kept)
            for name, limit in limits_of(budget).items()
        ]
    )
    if latency is not None and "latency" in priced:
        limits[list(priced).index("latency")] -= latency.rest
    offered = {x.name: [s for s in options if can_have(x, s)] or [KEEP] for x in layers}
    prices = {
        x.name: np.array([[price(x, s) for price in priced.values()] for s in offered[x.name]])
        for x in layers
    }
    ladder = {
        layer.name: sorted(
            range(len(offered[layer.name])), key=prices[layer.name][:, 0].__getitem__
        )
        for layer in layers
    }
    rung = {layer.name: dice.randrange(len(offered[layer.name])) for layer in layers}

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
    up = [n for n, r in rung.items() for _ in range(len(offered[n]) - 1 - r)]
    dice.shuffle(up)
    for name in up:
        if rung[name] + 1 < len(offered[name]) and fits(spent + step(name, 1)):
            spent += step(name, 1)
            rung[name] += 1
    chosen = {n: offered[n][ladder[n][r]] for n, r in rung.items()}
    return Plan.make(graph, chosen | kept, budget, Solver("random", "unsolved"), latency=latency)
