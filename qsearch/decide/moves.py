"""Single-site moves on an assignment: repair what breaks a limit, then improve what the limits
allow; shared by heuristic solvers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

from .problem import Matrix, Picks, Problem, Vector, padded


class Moves:
    """A problem as padded matrices [sites, choices], on which all single-site changes are priced at
    once.

    Costs are divided by the size of their limits, so that several can be added; `caps` are the
    limits in that unit, `scales` its size. Padding is infinitely bad.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.values = padded(problem.values)
        self.scales = np.array(
            [max(abs(limit), problem.span[name]) or 1.0 for name, limit in problem.limits.items()]
        )
        self.costs = [
            padded(problem.costs[name]) / scale
            for name, scale in zip(problem.limits, self.scales, strict=True)
        ]
        self.caps: Vector = np.array(list(problem.limits.values())) / self.scales
        self._rows = np.arange(len(self.values))

    def within(self, limits: Mapping[str, float]) -> Moves:
        """The same matrices with other limits."""
        made = copy.copy(self)
        made.caps = np.array([limits[name] for name in self.problem.limits]) / self.scales
        return made

    def spent(self, picks: Picks) -> Vector:
        """What the assignment uses of each limit, in the unit of `caps`."""
        return np.array([cost[self._rows, picks].sum() for cost in self.costs])

    def value(self, picks: Picks) -> float:
        """Total value of the assignment, without interactions."""
        return float(self.values[self._rows, picks].sum())

    def repair(self, picks: Picks) -> Picks | None:
        """Change sites, those that lose least value for what they free first, until every limit
        holds; None where single changes don't get there.
        """
        picks = picks.copy()
        for _ in range(self.values.size):
            over = self.spent(picks) - self.caps
            broken = [i for i, x in enumerate(over) if x > 1e-12]
            if not broken:
                return picks
            freed = np.nan_to_num(
                sum(self._gain(self.costs[i], picks).clip(max=over[i]) for i in broken), nan=-np.inf
            )
            # A move that frees something but breaks another limit that holds would go round in
            # circles.
            for i in set(range(len(over))) - set(broken):
                freed[-self._gain(self.costs[i], picks) > -over[i]] = -np.inf
            lost = -self._gain(self.values, picks)
            price = np.where(freed > 1e-15, np.maximum(lost, 0) / np.maximum(freed, 1e-300), np.inf)
            site, choice = np.unravel_index(int(np.argmin(price)), price.shape)
            if not np.isfinite(price[site, choice]):
                return None
            picks[site] = choice
        return None

    def improve(self, picks: Picks) -> Picks:
        """Change sites, those that gain most value for what they cost first, while every limit
        holds and something is gained.
        """
        picks = picks.copy()
        for _ in range(self.values.size * 4):
            room = self.caps - self.spent(picks)
            gained = np.nan_to_num(self._gain(self.values, picks), nan=-np.inf)
            extra = np.zeros_like(gained)
            fits = gained > 0
            for cost, left in zip(self.costs, room, strict=True):
                more = -self._gain(cost, picks)
                fits &= more <= left + 1e-15
                extra += np.maximum(np.nan_to_num(more, nan=np.inf, posinf=np.inf), 0)
            if not fits.any():
                return picks
            rate = np.where(fits, gained / np.maximum(extra, 1e-12), -np.inf)
            site, choice = np.unravel_index(int(np.argmax(rate)), rate.shape)
            picks[site] = choice
        return picks

    def cheapest(self) -> Picks:
        """For each site the choice that uses least of all limits together; of equals the best."""
        total: Matrix = np.sum([*self.costs, np.zeros_like(self.values)], axis=0)
        picks: Picks = np.argmin(
            np.where(total <= total.min(axis=1, keepdims=True), self.values, np.inf), axis=1
        ).astype(np.int64)
        return picks

    def _gain(self, matrix: Matrix, picks: Picks) -> Matrix:
        """What every single change would take off the sum of `matrix`: [sites, choices]; -inf for
        padding.
        """
        gain: Matrix = matrix[self._rows, picks][:, None] - matrix
        return gain
