"""From a run's settings to plans: the allocate section of a config as a problem, its plan, its frontier, and the reasons for a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import AllocateSection
from .core import plugins
from .core.errors import QSearchError
from .core.graph import OpGraph
from .core.latency import Latency
from .core.plan import BitPlan, Budget, Solver, select
from .core.scheme import KEEP, Scheme, input_part
from .core.table import SensitivityTable
from .decide.constraints import Constraints

if TYPE_CHECKING:
    from .core.attribution import Attribution
    from .decide.why import Why
    from .report.frontier import Frontier

#: budgets of `qsearch allocate --frontier`, in stored bits a weight
FRONTIER = tuple(2.5 + 0.25 * i for i in range(23))


def latency_of(section: AllocateSection, graph: OpGraph, table: SensitivityTable) -> Latency | None:
    """The latency table that the section names: a measured file, or a device's roofline over the table's schemes; None where no time is limited."""
    if section.device is None:
        if section.latency is not None:
            raise QSearchError(
                "a budget in latency needs allocate.device: one of `qsearch list devices`, or a latency.json that was measured"
            )
        return None
    if section.device.endswith(".json"):
        return Latency.load(Path(section.device), graph.id)
    from .graphs.costs import device
    from .graphs.latency import roofline

    return roofline(graph, device(section.device), sorted(table.frame["scheme"].unique()))


def constraints_of(
    section: AllocateSection, graph: OpGraph, table: SensitivityTable
) -> Constraints:
    """The section's constraints and, where it names a target, that tool's: its formats at each layer, and the layers that it stores as one."""
    rules = section.constraints
    if section.target is None:
        return rules
    exporter = plugins.load("exporters", section.target)
    able: dict[str, list[str]] = {}
    known = table.values(section.metric)
    for layer in graph.quantizable:
        offered = [str(KEEP), *known.get(layer.name, {})]
        able[layer.name] = [
            s for s in offered if exporter.nearest(Scheme.parse(s), layer) == Scheme.parse(s)
        ]
    if all(schemes == [str(KEEP)] for schemes in able.values()):
        measured = sorted({s for row in known.values() for s in row})
        raise QSearchError(
            f"{section.target} has none of the schemes in the table ({', '.join(measured[:8])}) at any layer; profile some that it has"
        )
    return replace(rules, fused=rules.fused or exporter.fuses, allowed={**rules.allowed, **able})


def _settings(section: AllocateSection, graph: OpGraph, table: SensitivityTable) -> dict[str, Any]:
    return {
        "objective": section.objective,
        "constraints": constraints_of(section, graph, table),
        "latency": latency_of(section, graph, table),
    }


def make_plan(section: AllocateSection, graph: OpGraph, table: SensitivityTable) -> BitPlan:
    """The best plan by the section's settings, or the one that it spells out; what `inputs` adds is stored besides the budget."""
    from .decide.allocation import allocate

    if section.layers:
        plan = plan_by_hand(graph, section.layers)
    else:
        plan = allocate(
            graph,
            table,
            section.budget,
            solver=section.solver,
            seconds=section.seconds,
            **_settings(section, graph, table),
        )
    return with_inputs(graph, plan, section.inputs)


def plan_by_hand(graph: OpGraph, layers: Mapping[str, str]) -> BitPlan:
    """The plan in which each layer has the scheme of the first pattern of `layers` that matches it. Raises `QSearchError` for a layer without one."""
    chosen = _matched(graph, layers)
    for layer in graph.quantizable:
        if layer.name not in chosen:
            raise QSearchError(
                f"a plan by hand gives every layer a scheme; {layer.name} ({layer.role}) has none: end with '*': keep, or what it should be"
            )
    return BitPlan.make(
        graph,
        {x.name: chosen[x.name] if x.quantizable else KEEP for x in graph},
        solver=Solver("by hand", "unsolved"),
    )


def with_inputs(graph: OpGraph, plan: BitPlan, inputs: Mapping[str, str]) -> BitPlan:
    """`plan` with the inputs of its layers treated as the first pattern of `inputs` that matches says; layers that it keeps are left alone."""
    if not inputs:
        return plan
    added = {name: input_part(text) for name, text in _matched(graph, inputs).items()}
    layers = {
        name: s if s == KEEP or name not in added else s.with_input(added[name])
        for name, s in plan.layers.items()
    }
    return BitPlan.make(graph, layers, solver=plan.solver)


def _matched(graph: OpGraph, patterns: Mapping[str, str]) -> dict[str, str]:
    """Layer -> the text of the first pattern that matches it."""
    found: dict[str, str] = {}
    for pattern, text in patterns.items():
        for layer in select(graph, pattern):
            found.setdefault(layer.name, text)
    return found


def make_frontier(
    section: AllocateSection,
    graph: OpGraph,
    table: SensitivityTable,
    bits: Sequence[float] = FRONTIER,
) -> list[BitPlan]:
    """A plan for each of `bits` that can be reached, the section's other limits kept. `ilp`, its default, is answered by the relaxation in one pass."""
    from .decide.allocation import allocate_frontier

    budget = replace(section.budget, average_bits=max(bits))
    solver = "lagrangian" if section.solver == "ilp" else section.solver
    return allocate_frontier(
        graph,
        table,
        bits,
        budget=budget,
        solver=solver,
        seconds=section.seconds,
        **_settings(section, graph, table),
    )


def save_frontier(
    folder: Path,
    section: AllocateSection,
    graph: OpGraph,
    table: SensitivityTable,
    bits: Sequence[float] = FRONTIER,
) -> list[BitPlan]:
    """`make_frontier`, written as `frontier/plan-BITS.json` and drawn as `frontier.svg` in `folder`; plans of an earlier call are taken away."""
    from .report.drawing import save_svg
    from .report.frontier import draw_frontier

    plans = make_frontier(section, graph, table, bits)
    for old in (folder / "frontier").glob("plan-*.json"):
        old.unlink()
    for plan in plans:
        assert plan.budget is not None
        plan.save(folder / "frontier" / f"plan-{plan.budget.average_bits:.2f}.json")
    save_svg(
        folder / "frontier.svg",
        draw_frontier(frontier_of(section, graph, table, plans)),
        label="stored size against predicted loss, planned and uniform",
    )
    return plans


def frontier_of(
    section: AllocateSection,
    graph: OpGraph,
    table: SensitivityTable,
    plans: Sequence[BitPlan],
    rows: Sequence[Any] = (),
) -> Frontier:
    """The frontier's picture as data, by the section's objective; `rows`: results of a run, to stand beside what is predicted."""
    from .report.frontier import frontier

    power = not section.decibels and set(section.objective.weights) == {"noise"}
    return frontier(graph, section.objective.values(table), plans, rows, power=power)


def pictured(
    section: AllocateSection,
    graph: OpGraph,
    table: SensitivityTable,
    plan: BitPlan,
    rows: Sequence[Any],
    explained: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What a page shows of a plan besides its own numbers, as keywords of `write_report`: the frontier, and what explains the plan.

    `explained`: where `qsearch explain` writes. What is refused is left out and said: the page of a finished run is not lost for one of its pictures.
    """

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except QSearchError as error:
            say(f"report: left out of the page: {error}")
            return None

    curve = attempt(
        lambda: frontier_of(section, graph, table, make_frontier(section, graph, table), rows)
    )
    reasons = [
        attempt(lambda: _shapley(graph, table, plan)),
        attempt(lambda: _explained(explained, graph)),
    ]
    return {"frontier": curve, "attributions": [r for r in reasons if r is not None]}


def _shapley(graph: OpGraph, table: SensitivityTable, plan: BitPlan) -> Attribution | None:
    """What each layer adds to the plan's predicted error; None where no probes made the table, or nothing is quantized."""
    from .learn.shapley import explain_quadratic

    if table.shares is None or all(scheme.format == "keep" for scheme in plan.layers.values()):
        return None
    return explain_quadratic(
        graph, table, {"plan": plan}, metrics=sorted({metric for metric, _ in table.shares.values})
    )


def _explained(path: Path, graph: OpGraph) -> Attribution | None:
    from .core.attribution import Attribution

    return Attribution.load(path, graph.id) if path.is_file() else None


def sized(budget: Budget, plan: BitPlan) -> Budget:
    """A budget without latency, for which a random plan would need a table; of a budget in latency alone, the plan's own size."""
    rest = {name: limit for name, limit in budget.content().items() if name != "latency"}
    return Budget(**rest) if rest else Budget(average_bits=plan.achieved.average_bits)


def ask_why(path: Path, layer: str) -> Why:
    """The reasons for one layer of a plan.json that lies in a run folder, or in its `frontier/`."""
    from . import config as configs
    from .decide.allocation import state
    from .decide.why import why

    folder = next(
        (f for f in (path.parent, path.parent.parent) if (f / "graph.json").is_file()), path.parent
    )
    graph = OpGraph.load(folder / "graph.json")
    table = SensitivityTable.load(folder / "sensitivity.parquet", graph.id)
    section = configs.load(folder / "config.yaml").allocate
    latency = latency_of(section, graph, table)
    plan = BitPlan.load(path, graph, latency=latency)
    graph.layer(layer)
    problem = state(
        graph,
        table,
        plan.budget or section.budget,
        objective=section.objective,
        constraints=constraints_of(section, graph, table),
        latency=latency,
    )
    return why(problem, plan, layer)
