"""Optuna's NSGA-II on real evaluations, loss against the first limit's cost, started from the
frontier; no bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.plan import Solver
from ..problem import Choice, Problem
from ..search import Evaluate, search

if TYPE_CHECKING:
    import optuna

exact = False
quadratic = True


def solve(
    problem: Problem,
    *,
    seconds: float = 60.0,
    evaluate: Evaluate | None = None,
    trials: int = 60,
    seed: int = 0,
) -> tuple[dict[str, Choice], Solver]:
    """Best allowed assignment of `trials` evaluations (Deb et al. 2002, "A fast and elitist
    multiobjective genetic algorithm: NSGA-II").

    `evaluate`: assignment -> measured loss; by default the problem's own total. Raises
    `InfeasibleBudget` where no assignment is allowed.
    """
    return search(
        problem,
        _sampler,
        "nsga2",
        evaluate=evaluate,
        trials=trials,
        seconds=seconds,
        seed=seed,
        two_sided=bool(problem.limits),
    )


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.NSGAIISampler(seed=seed, population_size=16)
