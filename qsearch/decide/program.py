"""The integer program, for HiGHS (scipy.optimize.milp), scaled so that its tolerances mean nothing,
and checked afterwards.

HiGHS counts with absolute tolerances: on layers four decades apart in size it called plans optimal
that were 8 times worse than the best, and took some that broke their budget. So it never sees the
problem as it is. Prices of the relaxation turn values into reduced costs: what a choice loses
against the bound. Choices that lose more than the best known assignment does can be in no better
one and are left out (exact, and most of them go); the objective that remains is small, and counted
in thousandths of the gap. What comes back is added up again in full, and an assignment that breaks
a limit becomes a cover cut in whole numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..core.errors import QSearchError
from .problem import Picks, Problem, Vector, formats
from .relaxation import Relaxed, at_prices

_ROOM = 1e6  # what the room within a limit is scaled to; HiGHS keeps it to about 1e-6
_GAP = 1e3  # what the gap that is left is scaled to
_ROUNDS = 100  # cuts at the most


@dataclass(frozen=True)
class Found:
    """`picks` within all limits, or None where time ran out before there were any; `proven`: HiGHS
    calls them optimal; `bound`: by HiGHS.
    """

    picks: Picks | None
    proven: bool
    bound: float


def solve_program(
    problem: Problem,
    *,
    seconds: float,
    relaxed: Relaxed | None = None,
    incumbent: float | None = None,
) -> Found | None:
    """Best assignment within all limits and formats; None when there is none. `incumbent`: the
    value of one that is known; no worse one is sought.

    Variables: one binary a site and choice, one a format, the room left of each limit that has a
        price. Values alone: interactions are not linear.
    """
    ends = time.monotonic() + seconds
    relaxed = relaxed or at_prices(problem, np.zeros(len(problem.limits)))
    reduced = _reduced(problem, relaxed.prices)
    gap = None if incumbent is None else max(incumbent - relaxed.bound, 0.0)
    if gap is not None:
        rounding = 1e-12 * max(
            abs(incumbent or 0.0),
            abs(relaxed.bound),
            *(float(np.abs(v).max()) for v in problem.values),
        )
        kept = [np.flatnonzero(r <= gap * (1 + 1e-9) + rounding) for r in reduced]
    else:
        kept = [np.arange(len(r)) for r in reduced]
    part = replace(problem.cut(kept), formats=problem.formats, scores=None)
    inside = _Program(part, [r[k] for r, k in zip(reduced, kept, strict=True)], relaxed, gap)
    cuts: list[LinearConstraint] = []
    for _ in range(_ROUNDS):
        result = milp(
            inside.objective,
            integrality=inside.integral,
            bounds=Bounds(0, inside.upper),
            constraints=[*inside.constraints, *cuts],
            options={"time_limit": max(0.05, ends - time.monotonic()), "mip_rel_gap": 0.0},
        )
        if result.status == 2 or not inside.possible:
            return None
        bound = relaxed.bound + max(0.0, float(result.mip_dual_bound or 0.0)) * inside.unit
        if result.x is None:
            return Found(None, False, bound)
        picks = inside.picks(result.x)
        if not part.broken(picks):
            return Found(
                np.array([k[j] for k, j in zip(kept, picks, strict=True)], np.int64),
                result.status == 0,
                bound,
            )
        row, most = _cover(part, picks)
        cuts.append(LinearConstraint(inside.widened(row), -np.inf, most))
    raise QSearchError(
        f"the solver keeps {', '.join(problem.limits)} only roughly, after {_ROUNDS} "
        "attempts; change the budget a little"
    )


def _reduced(problem: Problem, prices: Vector) -> list[Vector]:
    """Of each site, how much more each choice costs at these prices than its best one."""
    out = []
    for i, values in enumerate(problem.values):
        priced = values + sum(
            (p * problem.costs[n][i] for p, n in zip(prices, problem.limits, strict=True)),
            np.zeros(len(values)),
        )
        out.append(priced - priced.min())
    return out


class _Program:
    """Matrices for HiGHS: objective = value - bound, in units of a thousandth of the gap, as
    reduced costs and priced room.
    """

    def __init__(
        self, problem: Problem, reduced: list[Vector], relaxed: Relaxed, gap: float | None
    ) -> None:
        self.sizes = [len(r) for r in reduced]
        flat = np.concatenate(reduced)
        self.unit = (gap if gap else float(flat.max()) or 1.0) / _GAP
        owner = np.repeat(np.arange(len(self.sizes)), self.sizes)
        known = (
            sorted({f for options in problem.choices for o in options for f in formats(o)})
            if problem.formats is not None
            else []
        )
        priced = [k for k, p in enumerate(relaxed.prices) if p > 0]
        n, self.count = len(flat), len(flat) + len(known) + len(priced)
        self.objective = np.zeros(self.count)
        self.objective[:n] = flat / self.unit
        self.upper = np.ones(self.count)
        self.integral = np.ones(self.count, np.int64)
        self.constraints: list[Any] = [
            LinearConstraint(self._sparse(owner, np.arange(n), np.ones(n), len(self.sizes)), 1, 1)
        ]
        self.possible = True
        for k, (name, limit) in enumerate(problem.limits.items()):
            least = [c.min() for c in problem.costs[name]]
            room = limit - float(sum(least))
            row = np.concatenate(
                [c - low for c, low in zip(problem.costs[name], least, strict=True)]
            )
            tolerance = 1e-12 * (abs(limit) + problem.span[name])
            self.possible &= room >= -tolerance
            self.upper[:n][row > room + tolerance] = 0  # would break the limit alone
            row = np.where(row > room + tolerance, 0.0, row)
            scale = _ROOM / room if room > tolerance else 0.0
            if k in priced:
                slack = n + len(known) + priced.index(k)
                self.objective[slack] = relaxed.prices[k] * max(room, 0.0) / _ROOM / self.unit
                self.integral[slack], self.upper[slack] = 0, _ROOM
                if scale:
                    whole = np.append(row * scale, 1.0)
                    self.constraints.append(
                        LinearConstraint(
                            self._sparse(
                                np.zeros(n + 1, int), np.append(np.arange(n), slack), whole, 1
                            ),
                            _ROOM,
                            _ROOM,
                        )
                    )
            elif scale and row.sum() > room:
                self.constraints.append(
                    LinearConstraint(
                        self._sparse(np.zeros(n, int), np.arange(n), row * scale, 1), -np.inf, _ROOM
                    )
                )
        if problem.formats is not None:
            self._limit_formats(problem, known, n, problem.formats)

    def _limit_formats(self, problem: Problem, known: list[str], n: int, most: int) -> None:
        """A choice needs its formats, and there are no more than so many of them."""
        rows, columns, numbers, count, at = [], [], [], 0, 0
        for options in problem.choices:
            for j, f in enumerate(known):
                having = [at + k for k, o in enumerate(options) if f in formats(o)]
                if having:
                    rows += [count] * (len(having) + 1)
                    columns += [*having, n + j]
                    numbers += [1.0] * len(having) + [-1.0]
                    count += 1
            at += len(options)
        if count:
            self.constraints.append(
                LinearConstraint(
                    self._sparse(np.array(rows), np.array(columns), np.array(numbers), count),
                    -np.inf,
                    0,
                )
            )
            every = np.arange(n, n + len(known))
            self.constraints.append(
                LinearConstraint(
                    self._sparse(np.zeros(len(known), int), every, np.ones(len(known)), 1),
                    -np.inf,
                    most,
                )
            )

    def _sparse(self, rows: Any, columns: Any, numbers: Any, count: int) -> Any:
        return coo_array((numbers, (rows, columns)), shape=(count, self.count)).tocsr()

    def picks(self, x: Vector) -> Picks:
        parts = np.split(x[: sum(self.sizes)], np.cumsum(self.sizes)[:-1])
        return np.array([int(np.argmax(p)) for p in parts], np.int64)

    def widened(self, row: Vector) -> Vector:
        out = np.zeros((1, self.count))
        out[0, : len(row)] = row
        return out


def _cover(problem: Problem, picks: Picks) -> tuple[Vector, float]:
    """A row and its upper bound that exclude an assignment which breaks a limit, and all that cost
    as much.

    A cover: sites whose choices break the limit though all others take their cheapest. Not all of
    them may cost that much.
    """
    name, over = next(iter(problem.broken(picks).items()))
    costs = problem.costs[name]
    extra = np.array([c[k] - c.min() for c, k in zip(costs, picks, strict=True)])
    cover = set(range(len(picks)))
    for i in np.argsort(extra):
        if extra[i] < over:
            over -= float(extra[i])
            cover.remove(int(i))
    row = [
        c >= c[k] if i in cover else np.zeros(len(c))
        for i, (c, k) in enumerate(zip(costs, picks, strict=True))
    ]
    return np.concatenate(row).astype(np.float64), len(cover) - 1.0
