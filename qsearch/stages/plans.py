"""Plans by a run's settings: its limits and constraints, plans by hand, inputs that are added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import plugins
from ..core.components import kind
from ..core.cost import Budget, select
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.plan import Plan, Solver
from ..core.scheme import KEEP, Scheme, input_part
from ..core.sites import sites_of
from ..core.steps import StepRanges
from ..core.table import SensitivityTable
from ..decide.constraints import Constraints
from ..decide.request import AllocationRequest

if TYPE_CHECKING:
    from .allocate import AllocateSettings

Made = TypeVar("Made")


def latency_of(
    settings: AllocateSettings, graph: OpGraph, table: SensitivityTable
) -> Latency | None:
    """The latency table that the section names: a measured file, or a device's roofline over the
    table's schemes; None where no time is limited.
    """
    if settings.device is None:
        if settings.latency is not None:
            raise QSearchError(
                "a budget in latency needs allocate.device: one of `qsearch list "
                "devices`, or a latency.json that was measured"
            )
        return None
    if settings.device.endswith(".json"):
        return Latency.load(Path(settings.device), graph.id)
    from ..graphs.costs import device
    from ..graphs.latency import roofline

    return roofline(graph, device(settings.device), sorted(table.frame["scheme"].unique()))


def rivals(settings: AllocateSettings, table: SensitivityTable) -> tuple[str, ...]:
    """Formats in the table of which the target's file has one at most; empty where there are not
    two of them.
    """
    if settings.target is None:
        return ()
    from ..execute.exporting import either

    measured = {Scheme.parse(s).format for s in table.frame["scheme"].unique()}
    found = [f for f in either(plugins.load("exporters", settings.target)) if f in measured]
    return tuple(found) if len(found) > 1 else ()


def by_rival(
    settings: AllocateSettings, table: SensitivityTable, make: Callable[[str], Made]
) -> list[Made]:
    """What `make` makes with each of the `rivals` ("" without any); those that are refused are left
    out.

    Raises:
        QSearchError: all are; the first one's reason.
    """
    made, refused = [], []
    for rival in rivals(settings, table) or ("",):
        try:
            made.append(make(rival))
        except QSearchError as error:
            refused.append(error)
    if not made:
        raise refused[0]
    return made


def predicted_loss(plan: Plan) -> float:
    """The loss that a solver says of its plan."""
    return plan.solver.objective or 0.0


def rival_of(settings: AllocateSettings, table: SensitivityTable, plan: Plan) -> str:
    """The one of the `rivals` that a plan has, or the first of them; "" without any."""
    found = rivals(settings, table)
    used = {scheme.format for scheme in plan.schemes}
    return next((f for f in found if f in used), next(iter(found), ""))


def constraints_of(
    settings: AllocateSettings, graph: OpGraph, table: SensitivityTable, rival: str = ""
) -> Constraints:
    """The section's constraints and, where it names a target, that tool's: its formats at each
    layer, and the layers that it stores as one.

    Args:
        settings: the section.
        graph: the model's graph.
        table: what was measured.
        rival: the one of the `rivals` that the plan may have; "" for all of them.

    Returns:
        The constraints.

    Raises:
        QSearchError: the target has none of the table's schemes.
    """
    rules = settings.constraints
    if settings.target is None:
        return rules
    from ..execute.exporting import takes, tied

    exporter = plugins.load("exporters", settings.target)
    others = {f for f in rivals(settings, table) if rival and f != rival}
    able: dict[str, list[str]] = {}
    known = table.values(settings.metric)
    for layer in graph.quantizable:
        offered = [str(KEEP), *known.get(layer.name, {})]
        if kind(graph.component(layer.name)) not in takes(exporter):
            offered = [str(KEEP)]
        able[layer.name] = [
            s
            for s in offered
            if (asked := Scheme.parse(s)).format not in others
            and exporter.nearest(asked, layer) == asked
        ]
    if all(schemes == [str(KEEP)] for schemes in able.values()):
        measured = sorted({s for row in known.values() for s in row})
        raise QSearchError(
            f"{settings.target} has none of the schemes in the table "
            f"({', '.join(measured[:8])}) at any layer; profile some that it has: `qsearch list "
            f"schemes --for {settings.target}`"
        )
    return replace(
        rules,
        tied=[*rules.tied, *tied(exporter, graph)],
        fused=rules.fused or exporter.fuses,
        allowed={**rules.allowed, **able},
    )


def request_of(
    settings: AllocateSettings, graph: OpGraph, table: SensitivityTable, rival: str = ""
) -> AllocationRequest:
    """The settings as a request to `qsearch.allocate`; `rival`: as in `constraints_of`."""
    return AllocationRequest(
        objective=settings.objective,
        constraints=constraints_of(settings, graph, table, rival),
        latency=latency_of(settings, graph, table),
        solver=settings.solver,
        seconds=settings.seconds,
        steps=settings.ranges,
        share=settings.share,
    )


#: a scheme may take so many times as long as `keep` before a plan avoids it
_SLACK = 1.1


def faster_only(
    rules: Constraints,
    latency: Latency | None,
    graph: OpGraph,
    table: SensitivityTable,
    metric: str,
) -> Constraints:
    """Constraints without the choices that a latency table says are slower than full precision.

    Args:
        rules: what must hold anyway.
        latency: seconds of each layer with each scheme; None leaves the rules as they are.
        graph: the model's graph.
        table: sensitivities, whose schemes are the choices.
        metric: of the table.

    Returns:
        The rules, with the schemes of each layer that take at most 1.1 times as long as `keep`.
    """
    if latency is None:
        return rules
    known, allowed = table.values(metric), dict(rules.allowed)
    for layer in graph.quantizable:
        seconds = latency.seconds.get(layer.name, {})
        offered = allowed.get(layer.name, [str(KEEP), *known.get(layer.name, {})])
        quick = [s for s in offered if not _slower(seconds, s)]
        if len(quick) < len(offered):
            allowed[layer.name] = quick or [str(KEEP)]
    return replace(rules, allowed=allowed)


def slower_in(plan: Plan, latency: Latency) -> dict[str, tuple[int, float]]:
    """Schemes of a plan that a latency table says are slower than full precision.

    Returns:
        Scheme -> (layers that have it and are slower with it, the most times as long as `keep`).
    """
    found: dict[str, tuple[int, float]] = {}
    for name, held in plan.choices.items():
        seconds = latency.seconds.get(name, {})
        for scheme in {str(s) for s in held}:
            if _slower(seconds, scheme):
                count, most = found.get(scheme, (0, 0.0))
                times = seconds[scheme] / seconds[str(KEEP)]
                found[scheme] = (count + 1, max(most, times))
    return found


def _slower(seconds: Mapping[str, float], scheme: str) -> bool:
    keep = seconds.get(str(KEEP), 0.0)
    return 0 < keep * _SLACK < seconds.get(scheme, 0.0)


#: a scheme, or one for each range of steps, as a config spells it
Spelt = str | tuple[str, ...]


def plan_by_hand(
    graph: OpGraph, layers: Mapping[str, Spelt], steps: StepRanges | None = None
) -> Plan:
    """The plan in which each layer has what the first pattern of `layers` that matches it says.

    Args:
        graph: the model's graph.
        layers: pattern -> a scheme, or one for each range of steps.
        steps: the ranges.

    Raises:
        QSearchError: a layer that no pattern matches, a list of another length than there are
            ranges.
    """
    chosen = _matched(graph, layers)
    for layer in graph.quantizable:
        if layer.name not in chosen:
            raise QSearchError(
                f"a plan by hand gives every layer a scheme; {layer.name} ({layer.role}) "
                "has none: end with '*': keep, or what it should be"
            )
    return Plan.make(
        graph,
        {x.name: chosen[x.name] if x.quantizable else KEEP for x in graph},
        solver=Solver("by hand", "unsolved"),
        steps=steps,
    )


def with_inputs(graph: OpGraph, plan: Plan, inputs: Mapping[str, str]) -> Plan:
    """`plan` with the inputs of its layers rounded as the first pattern of `inputs` that matches
    says; layers that it keeps are left alone.
    """
    if not inputs:
        return plan
    added = {name: input_part(text) for name, text in _matched(graph, inputs).items()}
    choices = {
        name: tuple(
            s if s == KEEP or name not in added else s.with_input(added[name]) for s in held
        )
        for name, held in plan.choices.items()
    }
    return Plan.make(graph, choices, solver=plan.solver, steps=plan.steps)


def with_sites(
    graph: OpGraph, plan: Plan, sites: Mapping[str, Spelt], steps: StepRanges | None = None
) -> Plan:
    """`plan` with attention as the first pattern of `sites` that matches says, in every range or in
    each.

    Raises:
        QSearchError: a pattern that matches no tensor of attention, or a scheme that none can have.
    """
    if not sites:
        return plan
    found: dict[str, Spelt] = {}
    for pattern, text in sites.items():
        for site in sites_of(graph, (pattern,)):
            found.setdefault(site, text)
    ranges = plan.steps if len(plan.steps) > 1 else steps
    choices: dict[str, Any] = {**plan.choices, **found}
    return Plan.make(graph, choices, solver=plan.solver, steps=ranges)


def with_attentions(graph: OpGraph, plan: Plan, other: Plan) -> Plan:
    """`plan` with the sites of attention as another plan has them."""
    if not other.sites:
        return plan
    choices: dict[str, Any] = {**plan.choices, **other.sites}
    return Plan.make(graph, choices, solver=plan.solver, steps=other.steps)


def carried_bytes(graph: OpGraph, plan: Plan) -> int:
    """What attentions carry from step to step for the rows of the call that the graph was read
    from, in 16 bits.
    """
    from ..choices.attention import attention_plugin

    total = 0
    for spec in graph.self_attentions.values():
        rows = max(1, spec.macs // (2 * spec.tokens**2 * spec.heads * spec.head_size))
        held = {s.attention for s in plan.choices.get(spec.site, ()) if s.carried}
        total += max((attention_plugin(t).state_bytes(t, spec, rows) for t in held), default=0)
    return total


def fitted_apart(graph: OpGraph, plan: Plan, steps: StepRanges) -> Plan:
    """`plan` with everything that calibration chooses fitted for each range of steps: a copy of a
    scaled weight for each.
    """
    if len(steps) == 1:
        return plan
    choices = {
        name: held * len(steps)
        if len(held) == 1 and held[0].fitted_by_range and len(graph.active(name, steps)) > 1
        else held
        for name, held in plan.choices.items()
    }
    return Plan.make(graph, choices, solver=plan.solver, steps=steps)


def _matched(graph: OpGraph, patterns: Mapping[str, Spelt]) -> dict[str, Any]:
    """Layer -> what the first pattern that matches it says."""
    found: dict[str, Any] = {}
    for pattern, text in patterns.items():
        for layer in select(graph, pattern):
            found.setdefault(layer.name, text)
    return found


def sized(budget: Budget, plan: Plan) -> Budget:
    """A budget for layers at random: without latency, for which they would need a table, and
    without limits on attention.

    Of a budget in these alone, the plan's own size.
    """
    others = ("latency", "attention_share", "total_bit_operations")
    rest = {name: limit for name, limit in budget.content().items() if name not in others}
    return Budget(**rest) if rest else Budget(average_bits=plan.achieved.average_bits)
