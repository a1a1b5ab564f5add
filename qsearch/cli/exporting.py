"""Commands that hand plans to other tools and take theirs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Folder, app, changed_run


@app.command()
def export(
    folder: Folder,
    to: Annotated[
        str, typer.Option("--to", help="one of `qsearch list exporters`", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="folder to make; RUN/export-NAME when left out",
            show_default=False,
        ),
    ] = None,
    nearest: Annotated[
        bool,
        typer.Option("--nearest", help="round schemes that the tool lacks to the nearest it has"),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="take the place of an existing folder")
    ] = False,
) -> None:
    """Write the plan as the file that another tool loads."""
    from .. import delivery

    with changed_run(folder) as job:
        for path in delivery.export(job, to, output, nearest=nearest, force=force):
            typer.echo(path)
