"""Exact: an integer linear program solved by HiGHS (scipy.optimize.milp), optimal or with its gap.

HiGHS is not believed (see `program.py`): its answer is added up again, and held against what a
heuristic found and against the Lagrangian bound, which needs no solver's tolerance.
"""

from __future__ import annotations

import time

from ...core.errors import QSearchError
from ...core.plan import Solver
from ..diagnosis import contradiction
from ..heuristics import gap_of, round_lp
from ..problem import Choice, Problem
from ..program import solve_program

exact = True
quadratic = False
_SAME = 1e-9  # relative: values and bounds nearer than that are equal


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Choice], Solver]:
    """Assignment of least total value within all limits, and what is known of it: `optimal`, or
    `time limit` with the gap.

    Raises `InfeasibleBudget`, naming two limits that contradict each other, when there is none.
    """
    if problem.scores is not None:
        raise QSearchError(
            "ilp is linear and has no interactions; take the solver local, or leave "
            "the interactions out"
        )
    began = time.monotonic()
    start = round_lp(problem, seconds=seconds)
    if start.relaxed is None:
        raise contradiction(problem)
    known = None if start.picks is None else problem.worth(start.picks)
    if known is not None and gap_of(known, start.relaxed.bound) <= _SAME:
        assert start.picks is not None
        return problem.chosen(start.picks), Solver(
            "ilp", "optimal", 0.0, start.relaxed.bound, known
        )
    found = solve_program(
        problem,
        seconds=max(0.05, seconds - (time.monotonic() - began)),
        relaxed=start.relaxed,
        incumbent=known,
    )
    if found is None and start.picks is None:
        raise contradiction(problem)
    picks, bound, status = start.picks, start.relaxed.bound, "feasible"
    value = None if found is None or found.picks is None else problem.worth(found.picks)
    better = (
        found is not None
        and value is not None
        and (known is None or value <= known + _SAME * abs(known))
    )
    if found is not None and better:
        picks = found.picks
    if found is not None and (better or not found.proven):
        bound, status = max(bound, found.bound), "optimal" if found.proven else "time limit"
    # Else: an "optimum" above what a heuristic found is none, and its bound is as little worth.
    if picks is None:
        raise QSearchError(f"the solver found no plan in {seconds:g} seconds; allow more")
    value = problem.worth(picks)
    bound = min(bound, value)
    return problem.chosen(picks), Solver("ilp", status, gap_of(value, bound), bound, value)
