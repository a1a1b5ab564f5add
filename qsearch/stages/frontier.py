"""Frontier: plans of many sizes by a run's settings, in `frontier/` and drawn in frontier.svg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import InfeasibleBudget
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .plans import by_rival, predicted_loss, request_of

if TYPE_CHECKING:
    from ..report.frontier import Frontier
    from .allocate import AllocateSettings
    from .folder import Run

#: budgets of `qsearch allocate --frontier`, in stored bits a weight
FRONTIER = tuple(2.5 + 0.25 * i for i in range(23))
#: those where the smallest plan is larger than all of these: a tool that stores 8 bits and scales
LARGE = tuple(8.5 + 0.5 * i for i in range(15))


def make_frontier(
    settings: AllocateSettings,
    graph: OpGraph,
    table: SensitivityTable,
    bits: Sequence[float] = FRONTIER,
) -> list[Plan]:
    """A plan for each of `bits` that can be reached (of `LARGE`, where none of the default ones
    can), the settings' other limits kept.

    `ilp`, their default, is answered by the relaxation in one pass.
    """
    found: dict[float, Plan] = {}
    made = by_rival(settings, table, lambda rival: _made(settings, graph, table, bits, rival))
    for plan in sorted((plan for plans in made for plan in plans), key=predicted_loss):
        assert plan.budget is not None
        found.setdefault(plan.budget.average_bits or 0.0, plan)
    return [found[size] for size in sorted(found)]


def _made(
    settings: AllocateSettings,
    graph: OpGraph,
    table: SensitivityTable,
    bits: Sequence[float],
    rival: str,
) -> list[Plan]:
    """The plans with that one of the `rivals`."""
    from ..decide.allocation import allocate_frontier

    asked = request_of(settings, graph, table, rival)
    if asked.solver == "ilp":
        asked = replace(asked, solver="lagrangian")
    try:
        budget = replace(settings.budget, average_bits=max(bits))
        return allocate_frontier(graph, table, bits, budget, asked)
    except InfeasibleBudget:
        if tuple(bits) != FRONTIER:
            raise
        budget = replace(settings.budget, average_bits=max(LARGE))
        return allocate_frontier(graph, table, LARGE, budget, asked)


def frontier(
    run: Run, graph: OpGraph, table: SensitivityTable, bits: Sequence[float] = FRONTIER
) -> list[Plan]:
    """`make_frontier`, written as `frontier/plan-BITS.json` and drawn in frontier.svg.

    Plans of an earlier call are taken away.
    """
    from ..report.frontier import draw_frontier
    from ..report.svg import save_svg

    settings = run.config.allocate
    plans = make_frontier(settings, graph, table, bits)
    for old in run.path("frontier").glob("plan-*.json"):
        old.unlink()
    for plan in plans:
        assert plan.budget is not None
        plan.save(run.path("frontier") / f"plan-{plan.budget.average_bits:.2f}.json")
    save_svg(
        run.path("frontier.svg"),
        draw_frontier(frontier_of(settings, graph, table, plans)),
        label="stored size against predicted loss, planned and uniform",
    )
    first, last = plans[0].achieved.average_bits, plans[-1].achieved.average_bits
    run.progress.say(
        f"allocate: {len(plans)} plans from {first:.2f} to {last:.2f} stored bits a weight in "
        f"{run.path('frontier')}, drawn in frontier.svg"
    )
    return plans


def frontier_of(
    settings: AllocateSettings,
    graph: OpGraph,
    table: SensitivityTable,
    plans: Sequence[Plan],
    rows: Sequence[Any] = (),
) -> Frontier:
    """The frontier's picture as data, by the section's objective; `rows`: results of a run, to
    stand beside what is predicted.
    """
    from ..report.frontier import frontier as picture

    power = not settings.decibels and set(settings.objective.weights) == {"noise"}
    return picture(graph, settings.objective.values(table), plans, rows, power=power)
