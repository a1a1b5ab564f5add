"""Why: the reasons for one layer of a plan, from the files of the run that it lies in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable

if TYPE_CHECKING:
    from ..decide.why import Why


def ask_why(path: Path, layer: str) -> Why:
    """The reasons for one layer of a plan.json that lies in a run folder, or in its `frontier/`.

    The end of a name does, such as `attn1.to_q`, where no other layer ends so.
    """
    from ..decide.allocation import state
    from ..decide.why import why
    from .config import NAME, load
    from .plans import latency_of, request_of, rival_of

    folder = next(
        (f for f in (path.parent, path.parent.parent) if (f / "graph.json").is_file()), path.parent
    )
    graph = OpGraph.load(folder / "graph.json")
    table = SensitivityTable.load(folder / "sensitivity.parquet", graph.id)
    settings = load(folder / NAME).allocate
    plan = Plan.load(path, graph, latency=latency_of(settings, graph, table))
    asked = request_of(settings, graph, table, rival_of(settings, table, plan))
    layer = by_suffix(graph, layer)
    return why(state(graph, table, plan.budget or settings.budget, asked), plan, layer)


def by_suffix(graph: OpGraph, name: str) -> str:
    """The layer of that name, or the one whose name ends so.

    Raises:
        QSearchError: there is none, or several end so.
    """
    found = [x.name for x in graph if x.name == name or x.name.endswith(f".{name}")]
    if name in found or not found:
        return graph.layer(name).name
    if len(found) > 1:
        raise QSearchError(
            f"{len(found)} layers end in {name!r}, such as {', '.join(found[:3])}; give "
            "more of the "
            "name"
        )
    return found[0]
