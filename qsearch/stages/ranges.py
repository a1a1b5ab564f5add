"""A plan's ranges of steps beside the run's sampler: each needs a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.plan import Plan

if TYPE_CHECKING:
    from .folder import Run


def check_ranges(run: Run, plan: Plan) -> None:
    """Refuse, before any work, a plan with a range of steps that holds no step of the run's
    sampler.
    """
    if len(plan.steps) > 1:
        plan.steps.members(run.sampling.steps)
