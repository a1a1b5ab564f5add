"""Search on real evaluations with Optuna, started from the frontier: for when a table's word is not
enough, and measuring is affordable.

Each trial proposes a choice for every site; what breaks a limit is repaired by the same single
changes as everywhere, so that nothing is measured that could not be used. The first trials are the
additive optimum at the budget and, where there is one limit, at tighter ones: the search begins
where a search without a table would hope to end. Of assignments that came before, nothing is
measured twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..core.plan import Solver
from .heuristics import round_lp
from .moves import Moves
from .problem import Choice, Picks, Problem

if TYPE_CHECKING:
    import optuna

#: the measured loss of an assignment: less is better
Evaluate = Callable[[dict[str, Choice]], float]
_TIGHTER = (1.0, 0.97, 0.94, 0.9, 0.85)  # shares of a single limit at which the search also begins


def search(
    problem: Problem,
    sampler: Callable[[int], optuna.samplers.BaseSampler],
    name: str,
    *,
    evaluate: Evaluate | None,
    trials: int,
    seconds: float,
    seed: int,
    two_sided: bool,
) -> tuple[dict[str, Choice], Solver]:
    """The best allowed assignment of at most `trials` evaluations. Without `evaluate` the problem's
    own total is taken, which costs nothing.

    `two_sided`: the first limit's cost is a second objective, so that the search keeps a whole
    front. Raises `InfeasibleBudget` where no assignment is allowed.
    """
    import optuna

    from .solvers import ilp

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    began = time.monotonic()
    additive, moves = replace(problem, scores=None), Moves(problem)
    begin = problem.picks(ilp.solve(additive, seconds=0.2 * seconds)[0])
    measure = evaluate or problem.total
    known: dict[bytes, float] = {}

    def value(picks: Picks) -> float:
        key = picks.tobytes()
        if key not in known:
            known[key] = float(measure(problem.chosen(picks)))
        return known[key]

    def objective(trial: optuna.Trial) -> float | tuple[float, float]:
        asked = [
            trial.suggest_categorical(site, list(range(len(options))))
            for site, options in zip(problem.sites, problem.choices, strict=True)
        ]
        picks = moves.repair(np.array(asked, np.int64))
        if picks is None or not problem.keeps(picks):
            raise optuna.TrialPruned
        worth = value(picks)
        return (worth, problem.used(first, picks)) if two_sided else worth

    first = next(iter(problem.limits), "")
    study = optuna.create_study(
        directions=["minimize"] * (2 if two_sided else 1), sampler=sampler(seed)
    )
    for picks in _starts(additive, begin):
        study.enqueue_trial({site: int(k) for site, k in zip(problem.sites, picks, strict=True)})
    value(begin)  # so that the answer is never worse than where the search began
    study.optimize(
        objective, n_trials=trials, timeout=max(0.1, seconds - (time.monotonic() - began))
    )
    best = min(known, key=lambda key: (known[key], key))
    if not math.isfinite(known[best]):
        best = begin.tobytes()
    return problem.chosen(np.frombuffer(best, np.int64)), Solver(
        name, "feasible", objective=known[best]
    )


def _starts(problem: Problem, optimum: Picks) -> list[Picks]:
    found = [optimum]
    if len(problem.limits) == 1 and problem.formats is None:
        [(name, limit)] = problem.limits.items()
        for share in _TIGHTER[1:]:
            picks = round_lp(replace(problem, limits={name: limit * share}), seconds=5.0).picks
            if picks is not None:
                found.append(picks)
    return found
