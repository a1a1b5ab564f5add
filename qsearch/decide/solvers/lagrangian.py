"""Each site alone at the prices of the linear relaxation, then repaired and filled; near the optimum, with a bound."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from ...core.errors import InfeasibleBudget
from ...core.plan import Solver
from ...core.scheme import Scheme
from ..moves import Moves
from ..problem import Problem

exact = False


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Scheme], Solver]:
    """Assignment within all limits, with the gap to the Lagrangian bound.

    The dual of a limit is its price: at the right prices all but a few sites are decided. Raises `InfeasibleBudget` where even the
    relaxation has no solution.
    """
    moves = Moves(problem)
    sizes = [len(c) for c in problem.choices]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate(problem.values)
    scale = float(values.max()) or 1.0
    once = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    rows = vstack([coo_array((np.concatenate(problem.costs[n]) / max(limit, 1e-300))[None]) for n, limit in problem.limits.items()])
    limits = np.ones(len(problem.limits))
    relaxed = linprog(values / scale, rows, limits, once, np.ones(len(sizes)), (0, None), options={"time_limit": seconds})  # type: ignore[call-overload]  # sparse is taken, the stubs don't know
    if relaxed.status == 2:
        raise InfeasibleBudget(f"no assignment keeps all of {', '.join(problem.limits)} at once; loosen one of them")
    prices = np.zeros(len(problem.limits)) if relaxed.x is None else np.maximum(-np.asarray(relaxed.ineqlin.marginals), 0) * scale
    priced = moves.values + sum(price * cost for price, cost in zip(prices, moves.costs, strict=True))
    picks = moves.improve(moves.repair(np.argmin(priced, axis=1)))
    spent = moves.value(picks)
    # Weak duality: at any prices, so also at prices within the solver's tolerance, no assignment can be below this.
    bound = float(priced.min(axis=1).sum() - prices.sum())
    gap = max(0.0, (spent - bound) / spent) if spent > 0 else 0.0
    return moves.chosen(picks), Solver("lagrangian", "feasible", gap, bound, spent)
