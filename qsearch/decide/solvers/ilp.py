"""Exact: an integer linear program solved by HiGHS (scipy.optimize.milp), optimal or with its gap.

HiGHS counts with tolerances: where layers differ in size by a million times, an assignment that it calls feasible may be some bits
over its limit. Each answer is added up again, and a broken limit becomes a cut in whole numbers, where no tolerance matters.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from ...core.errors import InfeasibleBudget, QSearchError
from ...core.plan import Solver
from ...core.scheme import Scheme
from ..problem import Problem, Vector

exact = True
_LIMIT = 1e6  # what a limit is scaled to; the solver keeps it to about 1e-6
_ROUNDS = 100  # solutions looked at: three for the scale of the objective, the rest for cuts


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Scheme], Solver]:
    """Assignment of least total value within all limits, and what the solver says of it.

    Variables: one binary a site and choice; one equality a site; one inequality a limit, and one a cut. Raises `InfeasibleBudget` when
    limits contradict.
    """
    sizes = [len(c) for c in problem.choices]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate(problem.values)
    once = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    constraints = [LinearConstraint(once, 1, 1)]
    for name, limit in problem.limits.items():
        row = np.concatenate(problem.costs[name])
        constraints.append(LinearConstraint(row[None] * (_LIMIT / limit) if limit > 0 else row[None], -np.inf, _LIMIT if limit > 0 else limit))

    # The objective, too, is brought to a size at which the absolute tolerances mean nothing, known after a first solution.
    scale = float(values.max()) or 1.0
    rescaled = 0
    for _ in range(_ROUNDS):
        result = milp(
            values / scale,
            integrality=np.ones(len(owner), np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        chosen = _chosen(problem, sizes, result)
        if (cut := _cut(problem, chosen)) is not None:
            constraints.append(LinearConstraint(cut[0][None], -np.inf, cut[1]))
            continue
        spent = problem.total(chosen)
        bound = float(result.mip_dual_bound or 0.0) * scale
        if spent == 0 or spent / scale > 100 or rescaled == 2:
            break
        scale, rescaled = spent / 1000, rescaled + 1
    else:
        raise QSearchError(f"the solver keeps {', '.join(problem.limits)} only roughly, after {_ROUNDS} attempts; change the budget a little")
    gap = max(0.0, (spent - bound) / spent) if spent > 0 else 0.0
    return chosen, Solver("ilp", "optimal" if result.status == 0 else "time limit", gap, bound, spent)


def _chosen(problem: Problem, sizes: list[int], result: OptimizeResult) -> dict[str, Scheme]:
    if result.status == 2:
        raise InfeasibleBudget(f"no plan keeps all of {', '.join(problem.limits)} at once; loosen one of them")
    if result.x is None:
        raise QSearchError(f"the solver found no plan in its time ({result.message}); allow more seconds")
    picks = np.split(result.x, np.cumsum(sizes)[:-1])
    return {site: options[int(np.argmax(x))] for site, options, x in zip(problem.sites, problem.choices, picks, strict=True)}


def _cut(problem: Problem, chosen: dict[str, Scheme]) -> tuple[Vector, float] | None:
    """A row and its upper bound that exclude `chosen` and all that cost as much, where it breaks a limit; None where it keeps them all.

    A cover: sites whose choices break the limit though all others take their cheapest. Not all of them may cost that much.
    """
    picks = [options.index(chosen[site]) for site, options in zip(problem.sites, problem.choices, strict=True)]
    for name, limit in problem.limits.items():
        costs = problem.costs[name]
        extra = np.array([c[k] - c.min() for c, k in zip(costs, picks, strict=True)])
        over = float(sum(c[k] for c, k in zip(costs, picks, strict=True))) - limit
        if over <= 1e-12 * abs(limit):  # rounding of the sum, as `Budget.excess` allows
            continue
        cover = set(range(len(picks)))
        for i in np.argsort(extra):
            if extra[i] < over:
                over -= float(extra[i])
                cover.remove(int(i))
        row = [c >= c[k] if i in cover else np.zeros(len(c)) for i, (c, k) in enumerate(zip(costs, picks, strict=True))]
        return np.concatenate(row).astype(np.float64), len(cover) - 1.0
    return None
