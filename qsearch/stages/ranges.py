"""A plan's ranges of steps beside the run's sampler: each needs a step, and a component may run in some of them alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.steps import StepRanges

if TYPE_CHECKING:
    from .folder import Run


def check_ranges(run: Run, graph: OpGraph, plan: Plan) -> None:
    """Refuse a plan that the run's sampler can't carry out in full, before any work.

    Raises:
        QSearchError: a range of steps holds no sampler step; a site has a choice of its own in a range in which its component
            does not run.
    """
    if len(plan.steps) == 1:
        return
    plan.steps.members(run.sampling.steps)
    for component, ranges in running(run, graph, plan.steps).items():
        for site, held in plan.choices.items():
            if not site.startswith(f"{component}.") or len(held) == 1 or not ranges:
                continue
            heard = {held[i] for i in ranges}
            silent = [i for i in range(len(held)) if i not in ranges and held[i] not in heard]
            if silent:
                raise QSearchError(
                    f"{component} does not run in range {silent[0]} of {len(held)} ranges of {run.sampling.steps} sampler steps, "
                    f"and the plan has {held[silent[0]]} for {site} there; write {held[min(ranges)]}, what it has in range "
                    f"{min(ranges)}"
                )


def where_it_runs(run: Run, graph: OpGraph, plan: Plan) -> Plan:
    """The plan with the choices of ranges in which a component does not run taken from the nearest in which it does."""
    if len(plan.steps) == 1:
        return plan
    changes: dict[str, Any] = {}
    for component, ranges in running(run, graph, plan.steps).items():
        for site, held in plan.choices.items():
            if site.startswith(f"{component}.") and len(held) > 1 and ranges:
                nearest = [min(ranges, key=lambda r, i=i: abs(r - i)) for i in range(len(held))]  # type: ignore[misc]
                changes[site] = tuple(held[i] for i in nearest)
    return replace(plan.replaced(graph, changes), budget=plan.budget) if changes else plan


def running(run: Run, graph: OpGraph, steps: StepRanges) -> dict[str, set[int]]:
    """Component -> the ranges of steps in which the run's pipeline calls it, of pipelines that change denoisers on the way.

    diffusers' Wan 2.2 calls `transformer` at noise levels of `boundary_ratio` and above, and `transformer_2` below.
    """
    if len(graph.components) < 2:
        return {}
    config, total = run.pipe.config, run.sampling.steps
    boundary = config.get("boundary_ratio")
    if boundary is None or set(graph.components) != {"transformer", "transformer_2"}:
        return {}
    scheduler = copy.deepcopy(run.pipe.scheduler)
    scheduler.set_timesteps(total)
    levels = [float(t) / scheduler.config.num_train_timesteps for t in scheduler.timesteps]
    found: dict[str, set[int]] = {"transformer": set(), "transformer_2": set()}
    for step, level in enumerate(levels[:total]):
        name = "transformer" if level >= boundary else "transformer_2"
        found[name].add(steps.of(step, total))
    return found
