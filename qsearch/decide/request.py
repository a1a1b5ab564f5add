"""AllocationRequest: what is asked of a plan besides its budget, and of whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..core.errors import QSearchError, nearest
from ..core.interactions import Scores
from ..core.latency import Latency
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..core.steps import StepRanges
from .constraints import Constraints
from .objectives import Objective


@dataclass(frozen=True)
class AllocationRequest:
    """What is minimised, what must hold, which choices there are, and who looks for the plan.

    Attributes:
        metric: column of the table that is minimised.
        objective: says more than a metric: weights, limits on losses, decibels.
        constraints: what must hold besides the budget.
        latency: table of times, for a budget in seconds.
        schemes: choices, of those in the table; all of them when left out.
        scores: layer -> scheme -> one number a probe, the model of interactions, for each range of
            steps (a table made by probes has them).
        trust: how much of the interactions counts.
        steps: ranges of sampler steps between which the plan may differ, by the table's step bins.
        share: what the ranges have in common (`decide.ranges.SHARES`).
        solver: plug-in of `qsearch list solvers`.
        seconds: its time limit.
        evaluate: plan -> its measured loss, for a solver that searches on real evaluations (`tpe`,
            `nsga2`).
    """

    metric: str = "noise"
    objective: Objective | None = None
    constraints: Constraints | None = None
    latency: Latency | None = None
    schemes: Sequence[Scheme | str] | None = None
    scores: Sequence[Scores] | None = None
    trust: float | None = None
    steps: StepRanges | None = None
    share: str = "weights"
    solver: str = "ilp"
    seconds: float = 60.0
    evaluate: Callable[[Plan], float] | None = None

    @property
    def minimised(self) -> Objective:
        """The objective, or the single metric as one."""
        return self.objective or Objective({self.metric: 1.0})

    @property
    def ranged(self) -> bool:
        """Whether the plan may differ between ranges of steps."""
        return self.steps is not None and len(self.steps) > 1

    def with_named(self, named: Mapping[str, Any]) -> AllocationRequest:
        """The request with fields given by name.

        Args:
            named: field -> value.

        Returns:
            Another request.

        Raises:
            QSearchError: there is no such field; the message names the nearest.
        """
        known = [f.name for f in fields(self)]
        for name in named:
            if name not in known:
                raise QSearchError(f"an allocation has no {name!r}{nearest(name, known)}")
        return replace(self, **named)


def requested(request: AllocationRequest | None, named: Mapping[str, Any]) -> AllocationRequest:
    """A request, or the default one, with fields given by name."""
    return (request or AllocationRequest()).with_named(named)
