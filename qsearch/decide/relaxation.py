"""The linear relaxation: prices for the limits, a bound on every assignment, and the whole
size-error frontier of one limit at once.

With one limit, each site's useful choices are the corners of the lower convex hull of its (cost,
value) points, and the relaxation takes steps along these hulls, the steepest first, whatever the
budget: sorting the steps once solves every budget (Sinha and Zoltners 1979, "The multiple-choice
knapsack problem"). With several limits it is one linear program. Either way the prices give a bound
by weak
duality: it holds at any prices, so it does not rest on a solver's tolerance.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from .problem import Picks, Problem, Vector, padded


@dataclass(frozen=True)
class Relaxed:
    """`picks`: each site's best choice at the prices, near the limits but not always within;
    `prices`: one a limit; `bound`: no assignment is below.
    """

    picks: Picks
    prices: Vector
    bound: float


def relax(problem: Problem) -> Relaxed | None:
    """Prices and bound for all limits; None where even fractions of choices can't keep them.
    Interactions and formats are left out.
    """
    if len(problem.limits) == 1:
        [limit] = problem.limits.values()
        return Hull(problem).at(limit)
    prices = _prices(problem)
    return None if prices is None else at_prices(problem, prices)


def at_prices(problem: Problem, prices: Vector) -> Relaxed:
    """Each site alone at given prices, and the bound that they prove: min(value + price x cost) of
    each site, less price x limit.
    """
    priced = padded(problem.values)
    for price, name in zip(prices, problem.limits, strict=True):
        if price:
            priced = priced + price * padded(problem.costs[name], 0.0)
    bound = float(
        priced.min(axis=1).sum()
        - sum(p * limit for p, limit in zip(prices, problem.limits.values(), strict=True))
    )
    return Relaxed(np.argmin(priced, axis=1).astype(np.int64), prices, bound)


def _prices(problem: Problem) -> Vector | None:
    if not problem.limits:
        return np.zeros(0)
    sizes = [len(c) for c in problem.choices]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate([v - v.min() for v in problem.values])
    scale = float(values.max()) or 1.0
    once = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    rows, room, units = [], [], []
    for name, limit in problem.limits.items():
        least = [c.min() for c in problem.costs[name]]
        row = np.concatenate([c - low for c, low in zip(problem.costs[name], least, strict=True)])
        left = limit - float(sum(least))
        if left < -1e-12 * (abs(limit) + problem.span[name]):
            return None
        unit = max(left, float(row.max())) or 1.0
        rows.append(coo_array((row / unit)[None]))
        room.append(max(0.0, left) / unit)
        units.append(unit)
    solved = linprog(
        values / scale, vstack(rows), np.array(room), once, np.ones(len(sizes)), (0, None)
    )  # type: ignore[call-overload]  # sparse is taken, the stubs don't know
    if solved.status == 2:
        return None
    if solved.x is None:
        return np.zeros(len(units))
    prices: Vector = np.maximum(-np.asarray(solved.ineqlin.marginals), 0) * scale / np.array(units)
    return prices


class Hull:
    """The relaxation of a problem with one limit, at every value of that limit."""

    def __init__(self, problem: Problem) -> None:
        [self.name] = problem.limits
        self.problem = problem
        start, site, choice, extra, gain = [], [], [], [], []
        for i, (costs, values) in enumerate(
            zip(problem.costs[self.name], problem.values, strict=True)
        ):
            corners = _corners(costs, values)
            start.append(corners[0])
            for a, b in itertools.pairwise(corners):
                site.append(i)
                choice.append(b)
                extra.append(costs[b] - costs[a])
                gain.append(values[a] - values[b])
        self.start = np.array(start, np.int64)
        steps = np.array(extra, float), np.array(gain, float)
        with np.errstate(over="ignore"):
            rates = steps[1] / steps[0]
        order = np.argsort(
            -rates, kind="stable"
        )  # of one site in order, since its rates fall along the hull
        self.rates = rates[order]
        self._site, self._choice = (
            np.array(site, np.int64)[order],
            np.array(choice, np.int64)[order],
        )
        self._cost = np.cumsum(steps[0][order])
        self.least = problem.used(self.name, self.start)

    def at(self, limit: float) -> Relaxed | None:
        """The relaxation at one limit: all steps that fit before the first that does not; None
        below the cheapest assignment.
        """
        room = limit - self.least
        if room < -1e-12 * (abs(limit) + self.problem.span[self.name]):
            return None
        taken = int(np.searchsorted(self._cost, room * (1 + 1e-12), side="right"))
        picks = self.start.copy()
        picks[self._site[:taken]] = self._choice[
            :taken
        ]  # of several steps of one site the last assignment counts
        price = float(self.rates[taken]) if taken < len(self.rates) else 0.0
        bound = float(self._priced(price).min(axis=1).sum() - price * limit)
        return Relaxed(picks, np.array([price]), bound)

    def _priced(self, price: float) -> Vector:
        return self._matrices[0] + price * self._matrices[1]

    @cached_property
    def _matrices(self) -> tuple[Vector, Vector]:
        return padded(self.problem.values), padded(self.problem.costs[self.name], 0.0)


def _corners(costs: Vector, values: Vector) -> list[int]:
    """Indices of the corners of the lower convex hull, from the cheapest choice on, as long as the
    value falls.
    """
    hull: list[int] = []
    for k in np.lexsort((values, costs)).tolist():
        if hull and values[k] >= values[hull[-1]]:
            continue  # dearer and no better
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[a] - values[b]) * (costs[k] - costs[b]) > (values[b] - values[k]) * (
                costs[b] - costs[a]
            ):
                break
            hull.pop()
        if hull and costs[k] == costs[hull[-1]]:
            continue
        hull.append(k)
    return hull
