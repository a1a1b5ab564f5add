"""Commands that take other tools' plans: import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Folder, Terminal, app


@app.command(name="import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="another tool's plan: a file, or a folder of an export", show_default=False
        ),
    ],
    folder: Folder,
    form: Annotated[
        str,
        typer.Option(
            "--from",
            help="its format: one of `qsearch list importers`, or of exporters; found out when left out",
        ),
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="take the place of the run's plan or table")
    ] = False,
) -> None:
    """Take another tool's plan (or MixDQ's table) into a run, to measure, explain and beat it."""
    from ..core.errors import QSearchError
    from ..core.graph import OpGraph
    from ..execute.importing import import_plan

    graph = OpGraph.load(folder / "graph.json")
    found = import_plan(source, graph, form)
    path = folder / ("plan.json" if found.plan is not None else "sensitivity.parquet")
    if path.exists() and not force:
        raise QSearchError(
            f"{path} exists and would be overwritten; give --force, or another run folder"
        )
    for note in found.notes:
        Terminal().say(note)
    if found.plan is not None:
        found.plan.save(path)
        typer.echo(
            f"{path}: {found.source}, {found.plan.achieved.average_bits:.2f} stored bits a weight"
        )
    elif found.table is not None:
        found.table.save(path)
        typer.echo(f"{path}: {found.source}, {len(found.table.frame)} measurements")
