"""Local search on the quadratic model: single changes and swaps of two, priced all at once and
updated, not computed anew.

With the scores' sum over the plan, T = sum_l s_l, changing site l by d moves the error by 2 T.d +
d.d: after a change only T moves, so that the prices of all other changes follow with one product.
Swaps are looked for among the changes that are worth most at the limits' prices.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from .moves import Moves
from .problem import Matrix, Picks, Problem, Vector
from .relaxation import relax

_SHORTLIST = 160  # changes among which pairs are looked for
_MOVES = 50  # for each site, from one start to its local optimum
_KICKS = 24  # times a local optimum is left again
_KICKED = 4  # sites changed at random then, at the most


class Descent:
    """Local search on one problem; `scores` may be missing, then the model is additive."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.moves = problem, Moves(problem)
        given = (
            np.zeros((1, len(problem.sites), problem.width))
            if problem.scores is None
            else problem.scores
        )
        self.scores = given * np.sqrt(
            problem.trust / len(given)
        )  # so that products are sums over the probes
        self.own: Matrix = (self.scores**2).sum(0)
        self.rows = np.arange(len(problem.sites))
        relaxed = relax(replace(problem, scores=None))
        self.prices: Vector = (
            np.zeros(len(self.moves.scales))
            if relaxed is None
            else relaxed.prices * self.moves.scales
        )

    def run(self, picks: Picks, *, ends: float, seed: int = 0) -> Picks:
        """The best assignment found from `picks`, which must be allowed, by a counted number of
        moves.

        `ends`: time on the monotonic clock after which it stops all the same, a guard.
        """
        dice = np.random.default_rng(seed)
        best = self._descend(picks, ends)
        worth = self.problem.worth(best)
        for _ in range(_KICKS if len(self.rows) > 1 else 0):
            if time.monotonic() >= ends:
                break
            kicked = best.copy()
            for site in dice.choice(
                self.rows, min(int(dice.integers(1, _KICKED + 1)), len(self.rows)), replace=False
            ):
                kicked[site] = dice.integers(len(self.problem.choices[site]))
            back = self.moves.repair(kicked)
            if back is None:
                continue
            found = self._descend(back, ends)
            if (value := self.problem.worth(found)) < worth:
                best, worth = found, value
        return best

    def _descend(self, picks: Picks, ends: float) -> Picks:
        picks = picks.copy()
        spent = self.moves.spent(picks)
        taken = self.scores[:, self.rows, picks]
        along = np.einsum("p,plc->lc", taken.sum(1), self.scores)  # T . s
        beside = np.einsum("pl,plc->lc", taken, self.scores)  # s of the present choice . s
        small = 1e-12 * float(np.abs(self.moves.values[np.isfinite(self.moves.values)]).max())
        for _ in range(_MOVES * len(self.rows)):
            if time.monotonic() >= ends:
                break
            change = self._changes(picks, along, beside)
            more = [cost - cost[self.rows, picks][:, None] for cost in self.moves.costs]
            fits = np.isfinite(change)
            for extra, used, cap in zip(more, spent, self.moves.caps, strict=True):
                fits &= extra <= np.maximum(cap - used, 0) + 1e-13
            single = np.where(fits, change, np.inf)
            site, choice = np.unravel_index(int(np.argmin(single)), single.shape)
            steps = (
                [(int(site), int(choice))]
                if single[site, choice] < -small
                else self._swap(picks, change, more, spent, small)
            )
            if not steps:
                break
            for l, c in steps:  # noqa: E741  (l is a layer throughout)
                moved = self.scores[:, l, c] - self.scores[:, l, picks[l]]
                along += np.einsum("p,plc->lc", moved, self.scores)
                picks[l] = c
                beside[l] = self.scores[:, l, c] @ self.scores[:, l]
            spent = self.moves.spent(picks)
        return picks

    def _changes(self, picks: Picks, along: Matrix, beside: Matrix) -> Matrix:
        """What every single change adds to the total: [sites, choices]; inf for padding, zero for
        the present choice.
        """
        at = (self.rows, picks)
        values = self.moves.values - self.moves.values[at][:, None]
        change: Matrix = (
            values + 2 * (along - along[at][:, None]) - 2 * beside + 2 * self.own[at][:, None]
        )
        change[at] = np.inf
        return change

    def _swap(
        self, picks: Picks, change: Matrix, more: list[Matrix], spent: Vector, small: float
    ) -> list[tuple[int, int]]:
        """The best two changes at different sites that gain together and keep the limits; none
        where there are none.
        """
        ranked = np.where(np.isfinite(change), change, np.inf)
        for price, extra in zip(self.prices, more, strict=True):
            ranked = ranked + price * np.where(np.isfinite(extra), extra, 0.0)
        flat = np.argsort(ranked, axis=None, kind="stable")[:_SHORTLIST]
        sites, choices = np.unravel_index(flat[np.isfinite(ranked.ravel()[flat])], ranked.shape)
        if len(sites) < 2:
            return []
        moved = self.scores[:, sites, choices] - self.scores[:, sites, picks[sites]]
        alone = change[sites, choices]
        pairs = alone[:, None] + alone[None] + 2 * moved.T @ moved
        pairs[sites[:, None] == sites[None]] = np.inf
        for extra, used, cap in zip(more, spent, self.moves.caps, strict=True):
            each = extra[sites, choices]
            pairs[each[:, None] + each[None] > max(cap - used, 0.0) + 1e-13] = np.inf
        a, b = np.unravel_index(int(np.argmin(pairs)), pairs.shape)
        return [(int(sites[k]), int(choices[k])) for k in (a, b)] if pairs[a, b] < -small else []


def convex_bound(problem: Problem, picks: Picks, *, ends: float, rounds: int = 60) -> float:
    """No assignment's total is below this: the quadratic model is convex, so its tangents lie under
    it, and each has a Lagrangian bound.

    Frank and Wolfe's method on the relaxation (1956): from tangent to tangent towards the minimum.
    Valid after any number of rounds.
    """
    if problem.scores is None:
        relaxed = relax(problem)
        return -np.inf if relaxed is None else relaxed.bound
    shape = (len(problem.sites), problem.width)
    s = problem.scores.reshape(len(problem.scores), -1) * np.sqrt(
        problem.trust / len(problem.scores)
    )
    real = np.isfinite(values := Moves(problem).values)
    linear = np.where(real, values, 0.0).ravel() - (s**2).sum(0)
    begin = np.zeros(shape)
    begin[np.arange(shape[0]), picks] = 1
    x = begin.ravel()
    best = -np.inf
    for _ in range(rounds):
        there = s @ x
        slope = linear + 2 * (there @ s)
        sloped = slope.reshape(shape)
        tangent = replace(
            problem,
            values=tuple(sloped[i, : len(c)] for i, c in enumerate(problem.choices)),
            scores=None,
            formats=None,
        )
        relaxed = relax(tangent)
        if relaxed is None:
            return -np.inf
        best = max(best, float(linear @ x + there @ there - slope @ x) + relaxed.bound)
        y = np.zeros(shape)
        y[np.arange(shape[0]), relaxed.picks] = 1
        way = y.ravel() - x
        bend = float(((s @ way) ** 2).sum())
        step = min(1.0, max(0.0, -float(slope @ way) / (2 * bend))) if bend > 0 else 1.0
        if step == 0 or time.monotonic() > ends:
            break
        x = x + step * way
    return best
