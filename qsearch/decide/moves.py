"""Single-site moves on an assignment: repair what breaks a limit, then improve what the limits allow; shared by heuristic solvers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InfeasibleBudget, QSearchError
from ..core.scheme import Scheme
from .problem import Problem

Picks = NDArray[np.int64]
Matrix = NDArray[np.float64]


class Moves:
    """A problem as padded matrices [sites, choices], on which all single-site changes are priced at once.

    Costs are divided by their limits, so that every limit is 1 and several can be added. Padding is infinitely bad.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        width = max(len(c) for c in problem.choices)
        for name, limit in problem.limits.items():
            least = float(sum(c.min() for c in problem.costs[name]))
            if least > limit * (1 + 1e-12):
                raise InfeasibleBudget(f"no assignment keeps {name} within {limit:g}; the least possible is {least:g}")

        def padded(vectors: tuple[NDArray[np.float64], ...], scale: float = 1.0) -> Matrix:
            out = np.full((len(vectors), width), np.inf)
            for row, vector in zip(out, vectors, strict=True):
                row[: len(vector)] = vector / scale
            return out

        self.values = padded(problem.values)
        self.costs = [padded(problem.costs[name], max(limit, 1e-300)) for name, limit in problem.limits.items()]
        self._rows = np.arange(len(self.values))

    def spent(self, picks: Picks) -> Matrix:
        """Share of each limit that the assignment uses: [limits]."""
        return np.array([cost[self._rows, picks].sum() for cost in self.costs])

    def value(self, picks: Picks) -> float:
        """Total value of the assignment."""
        return float(self.values[self._rows, picks].sum())

    def repair(self, picks: Picks) -> Picks:
        """Change sites, those that lose least value for what they free first, until every limit holds."""
        picks = picks.copy()
        for _ in range(self.values.size):
            over = self.spent(picks) - 1
            broken = [i for i, x in enumerate(over) if x > 1e-12]
            if not broken:
                return picks
            freed = np.nan_to_num(sum(self._gain(self.costs[i], picks).clip(max=over[i]) for i in broken), nan=-np.inf)
            # A move that frees something but breaks another limit that holds would go round in circles.
            for i in set(range(len(over))) - set(broken):
                freed[-self._gain(self.costs[i], picks) > -over[i]] = -np.inf
            lost = -self._gain(self.values, picks)
            price = np.where(freed > 1e-15, np.maximum(lost, 0) / np.maximum(freed, 1e-300), np.inf)
            site, choice = np.unravel_index(int(np.argmin(price)), price.shape)
            if not np.isfinite(price[site, choice]):
                break
            picks[site] = choice
        raise QSearchError(f"single changes found no assignment within all of {', '.join(self.problem.limits)}; the solver ilp decides whether there is one")

    def improve(self, picks: Picks) -> Picks:
        """Change sites, those that gain most value for what they cost first, while every limit holds and something is gained."""
        picks = picks.copy()
        for _ in range(self.values.size * 4):
            room = 1 - self.spent(picks)
            gained = np.nan_to_num(self._gain(self.values, picks), nan=-np.inf)
            extra = np.zeros_like(gained)
            fits = gained > 0
            for cost, left in zip(self.costs, room, strict=True):
                more = -self._gain(cost, picks)
                fits &= more <= left + 1e-15
                extra += np.maximum(np.nan_to_num(more, nan=np.inf), 0)
            if not fits.any():
                return picks
            rate = np.where(fits, gained / np.maximum(extra, 1e-12), -np.inf)
            site, choice = np.unravel_index(int(np.argmax(rate)), rate.shape)
            picks[site] = choice
        return picks

    def chosen(self, picks: Picks) -> dict[str, Scheme]:
        """The assignment by name."""
        return {site: options[int(k)] for site, options, k in zip(self.problem.sites, self.problem.choices, picks, strict=True)}

    def cheapest(self) -> Picks:
        """For each site the choice that uses least of all limits together."""
        total: Matrix = np.sum(self.costs, axis=0)
        picks: Picks = np.argmin(total, axis=1)
        return picks

    def _gain(self, matrix: Matrix, picks: Picks) -> Matrix:
        """What every single change would take off the sum of `matrix`: [sites, choices]; -inf for padding."""
        gain: Matrix = matrix[self._rows, picks][:, None] - matrix
        return gain
