"""Each site alone at the prices of the linear relaxation, then repaired and filled; near the
optimum, with a bound.
"""

from __future__ import annotations

from ...core.errors import QSearchError
from ...core.plan import Solver
from ..diagnosis import contradiction
from ..heuristics import gap_of, round_lp
from ..problem import Choice, Problem

exact = False
quadratic = False


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Choice], Solver]:
    """Assignment within all limits, with the gap to the Lagrangian bound.

    The dual of a limit is its price: at the right prices all but a few sites are decided. Raises
    `InfeasibleBudget` where no assignment keeps the limits. `frontier.py` uses the same relaxation
    for every budget at once.
    """
    if problem.scores is not None:
        raise QSearchError(
            "lagrangian prices each site alone and ignores interactions; take the "
            "solver local, or leave the interactions out"
        )
    start = round_lp(problem, seconds=seconds)
    if start.relaxed is None:
        raise contradiction(problem)
    if start.picks is None:
        raise _none(problem, "lagrangian")
    value = problem.worth(start.picks)
    return problem.chosen(start.picks), Solver(
        "lagrangian", "feasible", gap_of(value, start.relaxed.bound), start.relaxed.bound, value
    )


def _none(problem: Problem, name: str) -> QSearchError:
    if problem.formats is None:
        return contradiction(problem)
    return QSearchError(
        f"{name} found no plan with at most {problem.formats} formats; the solver ilp "
        "decides whether there is one"
    )
