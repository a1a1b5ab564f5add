"""import_plan(path, graph) -> Imported: another tool's per-layer choices as a plan or a table, so
that they can be measured, explained and beaten.

An importer says what it recognises, and finds a scheme for each layer that a file names; a name
that is no layer is an error, as everywhere. What an exporter here wrote reads back through its own
`read`. What a scheme can't say exactly (a K-quant's scales of scales) becomes the nearest of the
same size, and is said in `notes`; layers that a file leaves out are kept. Files are data: nothing
in them is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..core import plugins
from ..core.errors import ArtifactError, QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan, Solver
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable

_LARGEST = 2**26  # bytes of a text file; a plan of the largest model takes one


@dataclass(frozen=True)
class Found:
    """What an importer read: layer -> scheme, or the rows of a sensitivity table (keys of
    `table.COLUMNS`); `notes`: what was not exact.
    """

    layers: Mapping[str, Scheme] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """A plan or a table for a graph, the name of the format that it came from, and what was not
    exact about it.
    """

    source: str
    plan: Plan | None
    table: SensitivityTable | None
    notes: tuple[str, ...]


class AbstractImporter(Protocol):
    """What a module in `importers/` provides."""

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like one of this format; cheap, and never an error."""
        ...

    def read(self, path: Path, graph: OpGraph) -> Found:
        """What the file says of the graph's layers. Raises `QSearchError` for a name that is no
        layer, and for files that are broken.
        """
        ...


def import_plan(path: Path | str, graph: OpGraph, source: str = "") -> Imported:
    """The plan or table in `path`. `source`: an importer or an exporter by name; found out where it
    is left out.

    Raises `QSearchError` where nothing recognises the file, names that are no layers, and a file
    that says nothing of any layer.
    """
    path = Path(path)
    if not path.exists():
        raise QSearchError(
            f"{path} does not exist; give a file or folder that another tool's plan is in"
        )
    name = source or _recognised(path)
    if name in plugins.names("importers"):
        importer: AbstractImporter = plugins.load("importers", name)
        found = importer.read(path, graph)
    elif name in plugins.names("exporters"):
        if not path.is_dir():
            raise QSearchError(f"what qsearch exported to {name} is a folder; {path} is a file")
        found = Found(plugins.load("exporters", name).read(path, graph))
    else:
        known = [*plugins.names("importers"), *plugins.names("exporters")]
        raise QSearchError(
            f"plans are imported from {', '.join(plugins.names('importers'))}, or from an "
            f"exporter's folder; given {name!r}{nearest(name, known)}"
        )
    if found.rows:
        return Imported(name, None, SensitivityTable.from_rows(graph.id, found.rows), found.notes)
    return _plan(name, path, graph, found)


def _recognised(path: Path) -> str:
    names = [
        name
        for name in plugins.names("importers")
        if plugins.load("importers", name).recognises(path)
    ]
    if len(names) != 1:
        raise QSearchError(
            f"{path} looks like {' and '.join(names) or 'no plan that is known here'}; "
            f"say with --from which of {', '.join(plugins.names('importers'))}"
        )
    return names[0]


def _plan(name: str, path: Path, graph: OpGraph, found: Found) -> Imported:
    for layer in found.layers:
        graph.layer(layer)
    if not found.layers:
        raise QSearchError(
            f"{path} says nothing of any layer of {graph.model}; is it a {name} file of this model?"
        )
    fixed = [x.name for x in graph if not x.quantizable and found.layers.get(x.name, KEEP) != KEEP]
    layers = {x.name: found.layers.get(x.name, KEEP) if x.quantizable else KEEP for x in graph}
    notes = list(found.notes)
    if missing := [x.name for x in graph.quantizable if x.name not in found.layers]:
        notes.append(f"{len(missing)} layers that the file leaves out are kept: {shown(missing)}")
    if fixed:
        notes.append(f"{len(fixed)} layers that no plan changes are kept: {shown(fixed)}")
    return Imported(
        name,
        Plan.make(graph, layers, solver=Solver(f"imported from {name}", "unsolved")),
        None,
        tuple(notes),
    )


def shown(names: Iterable[str]) -> str:
    """The first three of many names."""
    first = list(names)
    return ", ".join(first[:3]) + (", …" if len(first) > 3 else "")


def parse(path: Path) -> Any:
    """A JSON or YAML file as plain data: no tags, no aliases to blow up, nothing run. Raises
    `ArtifactError`.
    """
    import yaml

    try:
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes; a plan has at most {_LARGEST}"
            )
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ArtifactError(f"{path} has YAML aliases, which no plan needs; write it out")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not readable as JSON or YAML ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def peek(path: Path) -> Any:
    """`parse`, or None for what can't be read: for `recognises`."""
    try:
        return parse(path) if path.is_file() and path.suffix in (".json", ".yaml", ".yml") else None
    except QSearchError:
        return None
