"""Why: the reasons for one layer of a plan, from the files of the run that it lies in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable

if TYPE_CHECKING:
    from ..decide.why import Why


def ask_why(path: Path, layer: str) -> Why:
    """The reasons for one layer of a plan.json that lies in a run folder, or in its `frontier/`."""
    from ..decide.allocation import state
    from ..decide.why import why
    from .allocate import request_of
    from .config import NAME, load

    folder = next(
        (f for f in (path.parent, path.parent.parent) if (f / "graph.json").is_file()), path.parent
    )
    graph = OpGraph.load(folder / "graph.json")
    table = SensitivityTable.load(folder / "sensitivity.parquet", graph.id)
    settings = load(folder / NAME).allocate
    asked = request_of(settings, graph, table)
    plan = Plan.load(path, graph, latency=asked.latency)
    graph.layer(layer)
    return why(state(graph, table, plan.budget or settings.budget, asked), plan, layer)
