"""Commands that look at a run and change its settings: show, set, list, report, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import plugins
from ..core.errors import QSearchError
from .common import PRODUCTS, Folder, app, asked_run, console
from .options import model_options, settings_of


@app.command()
def show(
    artefact: Annotated[
        Path,
        typer.Argument(
            help="run folder; or graph.json, plan.json, sensitivity.parquet, "
            "attribution.parquet, results.json, trials.db",
            show_default=False,
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="table; of a graph also graphml, dot or json")
    ] = "table",
    device: Annotated[
        str | None,
        typer.Option(
            help="of a graph: time at best on one of `qsearch list devices`", show_default=False
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(help="of a graph: write a picture, .svg or .png", show_default=False),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(
            help="of a graph: the picture is of this block, else of the whole", show_default=False
        ),
    ] = None,
    why: Annotated[
        str | None,
        typer.Option(
            help="of a plan: the choices of this layer, and what another one would cost",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print a run's settings and files, or one artefact: a graph, a table, a plan with reasons.

    A graph also as a file for other tools, as a picture, and with the time it takes at best.
    """
    from ..core.graph import OpGraph
    from ..report import graph_picture, graph_view
    from ..report.text import plain
    from ..report.text import show as text
    from ..stages.config import NAME

    if block is not None and svg is None:
        raise QSearchError(f"--block chooses what --svg draws; given {block!r} without --svg FILE")
    if why is not None:
        from ..report.why import reasons
        from ..stages.why import ask_why

        for part in reasons(ask_why(artefact, why)):
            console().print(part)
        return
    if (artefact / NAME).is_file():
        from ..stages.overview import overview

        for row_title, rows in overview(artefact).items():
            console().print(plain(rows, row_title))
        return
    if form != "table":
        typer.echo(graph_view.export(OpGraph.load(artefact), form))
    if svg is not None:
        graph_picture.save_picture(OpGraph.load(artefact), svg, block)
        typer.echo(f"wrote {svg}")
    if device is not None or (form == "table" and svg is None):
        for shown in text(artefact, device):
            console().print(shown)


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="models, devices, schemes, quantizers, metrics, solvers, …; all when left out",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="of schemes: those that this tool has, one of `qsearch list exporters`",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="of schemes: for the layers of this run's model", show_default=False),
    ] = None,
) -> None:
    """List models, devices, schemes and plug-ins with their captions."""
    from .. import zoo
    from ..core import shipped
    from ..core.errors import nearest

    if kind == "schemes":
        from ..report.text import plain
        from ..stages.overview import scheme_rows

        rows = scheme_rows(target, run)
        title = f"schemes of {target or 'qsearch'}; {'' if run else 'for layers of common sizes; '}"
        console().print(plain(rows, f"{title}bits: stored bits a weight, scales included"))
        return
    if target is not None or run is not None:
        raise QSearchError("--for and --run are of schemes: qsearch list schemes --for TOOL")
    kinds = sorted([*plugins.KINDS, *shipped.KINDS])
    if kind not in (None, *kinds):
        raise QSearchError(
            f"there is nothing to list by the name of {kind!r}"
            f"{nearest(str(kind), [*kinds, 'schemes'])}"
        )
    found = []
    if kind in (None, "models"):
        found += [("models", name, "the zoo's, with weights") for name in zoo.PIPELINES]
    for one in [kind] if kind else kinds:
        known = shipped if one in shipped.KINDS else plugins
        found += [(one, name, known.caption(one, name)) for name in known.names(one)]
    if console().is_terminal:
        from ..report.text import listed

        console().print(listed([row[1:] if kind else row for row in found]))
        return
    for one, name, caption in found:  # a line each, for other programs
        typer.echo(f"{one:12} {name:16} {caption}")


@app.command(name="set")
def set_(
    folder: Folder,
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="e.g. allocate.average_bits=3.5; KEY= is back to the default",
            show_default=False,
        ),
    ],
) -> None:
    """Change settings of a run, or take them back to their defaults."""
    from ..stages.config import NAME, load, save, with_changes
    from ..stages.overview import said_settings

    asked = {}
    for text in changes:
        key, equals, value = text.partition("=")
        if not equals:
            raise QSearchError(
                f"a setting is KEY=VALUE, e.g. allocate.average_bits=3.5; given {text!r}"
            )
        asked[key] = value
    changed = with_changes(load(folder / NAME), asked)
    save(changed, folder / NAME)
    for line in said_settings(changed, asked):
        typer.echo(line)


@app.command()
def report(folder: Folder) -> None:
    """Write the run as a page, report.html, from what was measured; no model is loaded."""
    from ..stages.report import report_run

    with asked_run(folder, "report") as job:
        page = report_run(job)
    typer.echo(page)


@app.command()
@model_options("metrics", "prompts", "frames")
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="name of the zoo, local diffusers folder or hub id: what each verb would "
            "take for it",
            show_default=False,
        ),
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Say what this machine has: versions, devices, the products that serve each scheme, memory,
    disk; and what a model would take on it.
    """
    from ..report.text import plain
    from ..stages.config import Config, changed
    from ..stages.doctor import doctor as stage
    from ..stages.folder import Run

    run = None
    if model is not None:
        config = Config(model=model, folder=Path("runs") / Path(model).name)
        run = Run(changed(config, settings_of(given, "profile.samples"), "the command line"))
    elif given:
        raise QSearchError(f"--{next(iter(given))} is of a model; give one: qsearch doctor MODEL")
    found = stage(run=run)
    if run is not None:
        console().print(plain(found.verbs, found.offload))
    console().print(plain(found.facts, "qsearch doctor"))
    console().print(plain(found.products, PRODUCTS))
