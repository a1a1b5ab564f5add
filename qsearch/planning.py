"""From a run's settings to plans: the allocate section of a config as a problem, its plan, its frontier, and the reasons for a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import AllocateSection
from .core.errors import QSearchError
from .core.graph import OpGraph
from .core.latency import Latency
from .core.plan import BitPlan, Budget
from .core.table import SensitivityTable

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
            raise QSearchError("a budget in latency needs allocate.device: one of `qsearch list devices`, or a latency.json that was measured")
        return None
    if section.device.endswith(".json"):
        return Latency.load(Path(section.device), graph.id)
    from .graphs.costs import device
    from .graphs.latency import roofline

    return roofline(graph, device(section.device), sorted(table.frame["scheme"].unique()))


def _settings(section: AllocateSection, graph: OpGraph, table: SensitivityTable) -> dict[str, Any]:
    return {"objective": section.objective, "constraints": section.constraints, "latency": latency_of(section, graph, table)}


def make_plan(section: AllocateSection, graph: OpGraph, table: SensitivityTable) -> BitPlan:
    """The best plan by the section's settings."""
    from .decide.allocation import allocate

    return allocate(graph, table, section.budget, solver=section.solver, seconds=section.seconds, **_settings(section, graph, table))


def make_frontier(section: AllocateSection, graph: OpGraph, table: SensitivityTable, bits: Sequence[float] = FRONTIER) -> list[BitPlan]:
    """A plan for each of `bits` that can be reached, the section's other limits kept. `ilp`, its default, is answered by the relaxation in one pass."""
    from .decide.allocation import allocate_frontier

    budget = replace(section.budget, average_bits=max(bits))
    solver = "lagrangian" if section.solver == "ilp" else section.solver
    return allocate_frontier(graph, table, bits, budget=budget, solver=solver, seconds=section.seconds, **_settings(section, graph, table))


def save_frontier(folder: Path, section: AllocateSection, graph: OpGraph, table: SensitivityTable, bits: Sequence[float] = FRONTIER) -> list[BitPlan]:
    """`make_frontier`, written as `frontier/plan-BITS.json` and drawn as `frontier.svg` in `folder`; plans of an earlier call are taken away."""
    from .report.drawing import save_svg
    from .report.frontier import draw_frontier

    plans = make_frontier(section, graph, table, bits)
    for old in (folder / "frontier").glob("plan-*.json"):
        old.unlink()
    for plan in plans:
        assert plan.budget is not None
        plan.save(folder / "frontier" / f"plan-{plan.budget.average_bits:.2f}.json")
    save_svg(folder / "frontier.svg", draw_frontier(frontier_of(section, graph, table, plans)), label="stored size against predicted loss, planned and uniform")
    return plans


def frontier_of(section: AllocateSection, graph: OpGraph, table: SensitivityTable, plans: Sequence[BitPlan], rows: Sequence[Any] = ()) -> Frontier:
    """The frontier's picture as data, by the section's objective; `rows`: results of a run, to stand beside what is predicted."""
    from .report.frontier import frontier

    power = not section.decibels and set(section.objective.weights) == {"noise"}
    return frontier(graph, section.objective.values(table), plans, rows, power=power)


def pictured(
    section: AllocateSection, graph: OpGraph, table: SensitivityTable, plan: BitPlan, rows: Sequence[Any], explained: Path, say: Callable[[str], None]
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

    curve = attempt(lambda: frontier_of(section, graph, table, make_frontier(section, graph, table), rows))
    reasons = [attempt(lambda: _shapley(graph, table, plan)), attempt(lambda: _explained(explained, graph))]
    return {"frontier": curve, "attributions": [r for r in reasons if r is not None]}


def _shapley(graph: OpGraph, table: SensitivityTable, plan: BitPlan) -> Attribution | None:
    """What each layer adds to the plan's predicted error; None where no probes made the table, or nothing is quantized."""
    from .learn.shapley import explain_quadratic

    if table.shares is None or all(scheme.format == "keep" for scheme in plan.layers.values()):
        return None
    return explain_quadratic(graph, table, {"plan": plan}, metrics=sorted({metric for metric, _ in table.shares.values}))


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

    folder = next((f for f in (path.parent, path.parent.parent) if (f / "graph.json").is_file()), path.parent)
    graph = OpGraph.load(folder / "graph.json")
    table = SensitivityTable.load(folder / "sensitivity.parquet", graph.id)
    section = configs.load(folder / "config.yaml").allocate
    latency = latency_of(section, graph, table)
    plan = BitPlan.load(path, graph, latency=latency)
    graph.layer(layer)
    problem = state(graph, table, plan.budget or section.budget, objective=section.objective, constraints=section.constraints, latency=latency)
    return why(problem, plan, layer)
