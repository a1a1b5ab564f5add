"""The size-error frontier: an assignment for each of many budgets, from one pass over the
relaxation's steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ..core import plugins
from ..core.errors import InfeasibleBudget
from ..core.plan import Solver
from .diagnosis import contradiction
from .heuristics import gap_of
from .moves import Moves
from .problem import Choice, Problem
from .relaxation import Hull

Answer = tuple[dict[str, Choice], Solver]


def frontier(
    problem: Problem,
    name: str,
    limits: Sequence[float],
    *,
    solver: str = "lagrangian",
    seconds: float = 60.0,
) -> list[Answer | InfeasibleBudget]:
    """For each of `limits` on the cost `name` an assignment with its bound, or the error where
    there is none.

    With one limit, no formats and no interactions `lagrangian` sorts the steps of the relaxation
    once and reads every budget off; with more, and with every other solver, each budget is solved
    by itself.
    """
    if (
        solver == "lagrangian"
        and list(problem.limits) == [name]
        and problem.formats is None
        and problem.scores is None
    ):
        return _one_pass(problem, name, limits)
    module = plugins.load("solvers", solver)
    out: list[Answer | InfeasibleBudget] = []
    for limit in limits:
        try:
            out.append(
                module.solve(
                    replace(problem, limits={**problem.limits, name: limit}), seconds=seconds
                )
            )
        except InfeasibleBudget as error:
            out.append(error)
    return out


def _one_pass(
    problem: Problem, name: str, limits: Sequence[float]
) -> list[Answer | InfeasibleBudget]:
    hull, moves = Hull(problem), Moves(problem)
    out: list[Answer | InfeasibleBudget] = []
    for limit in limits:
        began = time.monotonic()
        relaxed = hull.at(limit)
        if relaxed is None:
            out.append(contradiction(replace(problem, limits={name: limit})))
            continue
        here = moves.within({name: limit})
        repaired = here.repair(relaxed.picks)  # rounding of long sums
        picks = here.improve(hull.start if repaired is None else repaired)
        value = problem.worth(picks)
        said = Solver(
            "lagrangian",
            "feasible",
            gap_of(value, relaxed.bound),
            relaxed.bound,
            value,
            round(time.monotonic() - began, 4),
        )
        out.append((problem.chosen(picks), said))
    return out
