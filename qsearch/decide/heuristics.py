"""Assignments that are good and allowed, found without search: what solvers begin with, and an
exact one is held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .moves import Moves
from .problem import Picks, Problem, Vector
from .program import solve_program
from .relaxation import Relaxed, relax


@dataclass(frozen=True)
class Start:
    """`picks`: an allowed assignment, None where none was found; `relaxed`: prices and bound, None
    where there is provably no assignment.
    """

    picks: Picks | None
    relaxed: Relaxed | None


def round_lp(problem: Problem, *, seconds: float) -> Start:
    """Each site alone at the prices of the relaxation, then repaired and filled; values alone,
    without interactions.
    """
    relaxed = relax(problem)
    if relaxed is None:
        return Start(None, None)
    return Start(with_format_limit(problem, lambda p: _near(p, seconds)), relaxed)


def _near(problem: Problem, seconds: float) -> Picks | None:
    relaxed = relax(problem)
    return None if relaxed is None else repair_to_feasible(problem, relaxed.picks, seconds)


def repair_to_feasible(problem: Problem, picks: Picks, seconds: float) -> Picks | None:
    """An assignment within all limits near the given one, filled up; None where there is none.
    Formats are not looked at.
    """
    moves = Moves(problem)
    repaired = moves.repair(picks)
    if repaired is None:
        repaired = moves.repair(moves.cheapest())
    if (
        repaired is None
        # single changes go round in circles; whether there is any assignment is a question for the
        # program
    ):
        free = replace(
            problem, values=tuple(np.zeros(len(v)) for v in problem.values), formats=None
        )
        found = solve_program(free, seconds=seconds)
        repaired = None if found is None else found.picks
    return None if repaired is None else moves.improve(repaired)


def with_format_limit(problem: Problem, solve: Callable[[Problem], Picks | None]) -> Picks | None:
    """`solve`, which does not limit formats, made to use few enough: the format that can best be
    spared goes first.

    Each candidate is a problem with some formats left out; of them the one with the least total
    goes on, until few enough are left.
    """
    picks = solve(problem)
    if (
        problem.formats is None
        or picks is None
        or len(problem.formats_of(picks)) <= problem.formats
    ):
        return picks
    used = problem.formats_of(picks)
    while len(used) > problem.formats:
        best: tuple[float, Picks] | None = None
        for spared in sorted(used):
            part = problem.only(used - {spared})
            found = None if part is None else solve(part[0])
            if part is None or found is None:
                continue
            here = np.array([kept[k] for kept, k in zip(part[1], found, strict=True)], np.int64)
            worth = problem.worth(here)
            best = (worth, here) if best is None or worth < best[0] else best
        if best is None:
            return None
        picks, used = best[1], problem.formats_of(best[1])
    return picks


def gap_of(value: float, bound: float) -> float:
    """How far a value may be above the best, relative to its size."""
    return (
        0.0
        if value <= bound
        else (value - bound) / max(abs(value), 1e-300)
        if math.isfinite(bound)
        else math.inf
    )


def shadow(problem: Problem, relaxed: Relaxed) -> dict[str, float]:
    """limit -> its price: what one unit more of it would take off the total."""
    prices: Vector = relaxed.prices
    return {name: float(p) for name, p in zip(problem.limits, prices, strict=True)}
