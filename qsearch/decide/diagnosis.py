"""Diagnosis: which two limits can't be kept at once, and how near one comes to the other."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from ..core.errors import InfeasibleBudget
from .problem import Problem
from .program import solve_program


def contradiction(problem: Problem, *, seconds: float = 10.0) -> InfeasibleBudget:
    """The error for a problem that has no assignment: the pair of limits that exclude each other,
    with the best of one where the other is kept.

    At most so many formats count as a limit. Where every two can be kept and only three or more
    together can't, all are named.
    """
    names = [*problem.limits, *(["formats"] if problem.formats is not None else [])]
    for name in problem.limits:
        if (best := _least(problem, name, [], seconds)) is None or _above(problem, name, best):
            return InfeasibleBudget(
                f"no plan reaches {_asked(problem, name)}; the least with these choices "
                f"is {_shown(problem, name, best)}"
            )
    for first, second in combinations(names, 2):
        for kept, sought in ((first, second), (second, first)):
            if sought == "formats":
                continue
            best = _least(problem, sought, [kept], seconds)
            if best is None or _above(problem, sought, best):
                asked = f"{_asked(problem, first)} and {_asked(problem, second)}"
                return InfeasibleBudget(
                    f"no plan keeps {asked} at once; with {kept} kept the least {sought} "
                    f"is {_shown(problem, sought, best)}"
                )
    sought, *others = problem.limits
    best = _least(problem, sought, [*others, *names[len(problem.limits) :]], seconds)
    told = (
        f"; with the others kept the least {sought} is {_shown(problem, sought, best)}"
        if best is not None
        else ""
    )
    return InfeasibleBudget(
        f"no plan keeps all of {', '.join(_asked(problem, n) for n in names)} at once, "
        f"though each two of them go together{told}"
    )


def _least(problem: Problem, sought: str, kept: list[str], seconds: float) -> float | None:
    """Least sum of one cost while others are kept; None where they can't be."""
    part = replace(
        problem,
        values=problem.costs[sought],
        costs={n: problem.costs[n] for n in kept if n != "formats"},
        limits={n: problem.limits[n] for n in kept if n != "formats"},
        formats=problem.formats if "formats" in kept else None,
        scores=None,
    )
    if not kept:
        return float(sum(np.min(c) for c in problem.costs[sought]))
    found = solve_program(part, seconds=seconds)
    return None if found is None or found.picks is None else problem.used(sought, found.picks)


def _above(problem: Problem, name: str, best: float) -> bool:
    return best > problem.limits[name] + 1e-12 * (abs(problem.limits[name]) + problem.span[name])


def _asked(problem: Problem, name: str) -> str:
    return (
        f"at most {problem.formats} formats"
        if name == "formats"
        else f"{name} {problem.limits[name] + problem.spent.get(name, 0.0):.6g}"
    )


def _shown(problem: Problem, name: str, best: float | None) -> str:
    return "unknown" if best is None else f"{best + problem.spent.get(name, 0.0):.6g}"
