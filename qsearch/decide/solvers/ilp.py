"""Exact: an integer linear program solved by HiGHS (scipy.optimize.milp), optimal or with its gap."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from ...core.errors import InfeasibleBudget, QSearchError
from ...core.plan import Solver
from ...core.scheme import Scheme
from ..problem import Problem

exact = True


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Scheme], Solver]:
    """Assignment of least total value within all limits, and what the solver says of it.

    Variables: one binary a site and choice; one equality a site; one inequality a limit. Raises `InfeasibleBudget` when limits contradict.
    """
    sizes = [len(c) for c in problem.choices]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate(problem.values)
    once = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    constraints = [LinearConstraint(once, 1, 1)]
    for name, limit in problem.limits.items():
        row = np.concatenate(problem.costs[name])
        # Rows of order one: the solver's tolerances are absolute.
        constraints.append(LinearConstraint(row[None] / limit if limit > 0 else row[None], -np.inf, 1.0 if limit > 0 else limit))

    # The objective, too, is brought to a size at which the absolute tolerances mean nothing, known after a first solution.
    scale = float(values.max()) or 1.0
    for _ in range(3):
        result = milp(
            values / scale,
            integrality=np.ones(len(owner), np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        chosen = _chosen(problem, sizes, result)
        spent = problem.total(chosen)
        bound = float(result.mip_dual_bound or 0.0) * scale
        if spent == 0 or spent / scale > 100:
            break
        scale = spent / 1000
    gap = max(0.0, (spent - bound) / spent) if spent > 0 else 0.0
    return chosen, Solver("ilp", "optimal" if result.status == 0 else "time limit", gap, bound, spent)


def _chosen(problem: Problem, sizes: list[int], result: OptimizeResult) -> dict[str, Scheme]:
    if result.status == 2:
        raise InfeasibleBudget(f"no plan keeps all of {', '.join(problem.limits)} at once; loosen one of them")
    if result.x is None:
        raise QSearchError(f"the solver found no plan in its time ({result.message}); allow more seconds")
    picks = np.split(result.x, np.cumsum(sizes)[:-1])
    return {site: options[int(np.argmax(x))] for site, options, x in zip(problem.sites, problem.choices, picks, strict=True)}
