"""Optuna's tree-structured Parzen estimator on real evaluations, started from the frontier; no
bound.
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
    """Best allowed assignment of `trials` evaluations (Bergstra et al. 2011, "Algorithms for
    hyper-parameter optimization").

    `evaluate`: assignment -> measured loss; by default the problem's own total. Raises
    `InfeasibleBudget` where no assignment is allowed.
    """
    return search(
        problem,
        _sampler,
        "tpe",
        evaluate=evaluate,
        trials=trials,
        seconds=seconds,
        seed=seed,
        two_sided=False,
    )


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
