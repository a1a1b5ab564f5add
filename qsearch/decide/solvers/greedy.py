"""From the cheapest assignment up, always the change that gains most value for what it costs; no bound."""

from __future__ import annotations

from ...core.plan import Solver
from ...core.scheme import Scheme
from ..moves import Moves
from ..problem import Problem

exact = False


def solve(problem: Problem, *, seconds: float = 60.0) -> tuple[dict[str, Scheme], Solver]:
    """Assignment within all limits. `seconds` is not needed: sites x choices changes at the most, each priced once a round."""
    del seconds
    moves = Moves(problem)
    picks = moves.improve(moves.repair(moves.cheapest()))
    return moves.chosen(picks), Solver("greedy", "feasible", objective=moves.value(picks))
