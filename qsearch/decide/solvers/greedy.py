"""From the cheapest assignment up, always the change that gains most value for what it costs; no
bound.
"""

from __future__ import annotations

from ...core.errors import QSearchError
from ...core.plan import Solver
from ..diagnosis import contradiction
from ..heuristics import repair_to_feasible, with_format_limit
from ..moves import Moves
from ..problem import Choice, Problem

exact = False
quadratic = False


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Choice], Solver]:
    """Assignment within all limits. Sites x choices changes at the most, each priced once a round.
    Raises `InfeasibleBudget` where there is none.
    """
    if problem.scores is not None:
        raise QSearchError(
            "greedy adds up single values and ignores interactions; take the solver "
            "local, or leave the interactions out"
        )
    picks = with_format_limit(
        problem, lambda part: repair_to_feasible(part, Moves(part).cheapest(), seconds)
    )
    if picks is None and problem.formats is not None:
        raise QSearchError(
            f"greedy found no plan with at most {problem.formats} formats; the solver ilp "
            "decides whether there is one"
        )
    if picks is None:
        raise contradiction(problem)
    return problem.chosen(picks), Solver("greedy", "feasible", objective=problem.worth(picks))
