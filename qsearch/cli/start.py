"""The command that begins: init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Terminal, app, keeps


@app.command()
def init(
    model: Annotated[
        str,
        typer.Argument(
            help="local diffusers folder, hub id, or a name of the zoo (scenes-dit)",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="config to write; NAME.yaml when left out", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="one of `qsearch list exporters`: only what that tool can carry out",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="text file, one prompt a line", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="torch device", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="type of the weights, e.g. bfloat16", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="take the place of an existing config")
    ] = False,
) -> None:
    """Write a short config that fits a model and this machine, and say what each verb will take."""
    from ..core.settings import checked
    from ..stages.init import InitSettings, shown
    from ..stages.init import init as stage

    keeps("interrupted; nothing was written")
    content = {
        "model": model,
        "output": output,
        "target": target,
        "prompts": prompts,
        "device": device,
        "dtype": dtype,
        "force": force,
    }
    terminal = Terminal()
    for line in shown(stage(checked(InitSettings, content, "qsearch init"))):
        terminal.say(line)
