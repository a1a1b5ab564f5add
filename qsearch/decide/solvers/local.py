"""Local search on the quadratic probe model: from the additive optimum, single changes and swaps;
with a bound from a convex relaxation.
"""

from __future__ import annotations

import time
from dataclasses import replace

from ...core.errors import QSearchError
from ...core.plan import Solver
from ..descent import Descent, convex_bound
from ..diagnosis import contradiction
from ..heuristics import gap_of, round_lp, with_format_limit
from ..problem import Choice, Picks, Problem

#: the search ends by the number of its moves; by the clock only after so many times its seconds
_GUARD = 10.0

exact = False
quadratic = True


def solve(
    problem: Problem, *, seconds: float = 60.0, seed: int = 0
) -> tuple[dict[str, Choice], Solver]:
    """Assignment within all limits, with the gap to the relaxation's bound. Raises
    `InfeasibleBudget` where no assignment keeps the limits.

    Without scores the model is additive, and the bound the Lagrangian one.
    """
    # Moves are counted, so that a loaded machine finds the same plan; time is a guard far behind.
    ends = time.monotonic() + _GUARD * seconds

    def best(part: Problem) -> Picks | None:
        start = round_lp(replace(part, scores=None), seconds=seconds).picks
        return None if start is None else Descent(part).run(start, ends=ends, seed=seed)

    picks = with_format_limit(problem, best)
    if picks is None and problem.formats is not None:
        raise QSearchError(
            f"local found no plan with at most {problem.formats} formats; the solver ilp "
            "decides whether there is one"
        )
    if picks is None:
        raise contradiction(problem)
    value = problem.worth(picks)
    bound = min(value, convex_bound(problem, picks, ends=ends))
    return problem.chosen(picks), Solver("local", "feasible", gap_of(value, bound), bound, value)
