"""Commands that run a plan and hand it on: apply, bench, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import QSearchError
from ..core.settings import checked
from .common import PRODUCTS, Folder, Terminal, app, asked_run, console, words
from .options import model_options, settings_of


@app.command()
@model_options("metrics")
def apply(
    folder: Folder,
    required: Annotated[
        bool,
        typer.Option(
            "--required",
            help="refuse layers whose low-bit arithmetic this machine has no kernel for",
        ),
    ] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Write the plan's packed model, model.safetensors: smaller in memory, not only on disk."""
    from ..core.plan import Plan
    from ..stages.apply import apply as stage

    with asked_run(folder, "apply", settings_of(given, "calibrate.samples")) as job:
        graph = job.graph()
        stage(job, graph, Plan.load(job.path("plan.json"), graph), required=required)


@app.command()
def bench(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|CARD]",
            help="whose layers to time; the kernels alone when left out",
            show_default=False,
        ),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            help="choices to time, e.g. uint4-c,int8-c+a8; a run's own when left out",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="latency.json for `allocate --device`; in a run folder when left out",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device; cpu when left out", show_default=False)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="for each thing that is timed", show_default=False)
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="of a card: pixels of the shorter side", show_default=False)
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="race whole calls of the denoiser, full precision and other tools beside",
        ),
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="with --whole: pictures at once", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="with --whole: peers, e.g. fp32,torchao-w8a8; all that are installed when "
            "left out",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="with --whole: of torch.compile: default, reduce-overhead (CUDA graphs), "
            "max-autotune, or none",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time the kernels on this machine, or every layer of a model, as a latency table for
    `allocate`; or whole denoisers, with other tools beside.
    """
    from ..report.text import plain
    from ..stages import bench as stage

    content: dict[str, Any] = {
        "schemes": words(schemes),
        "device": device,
        "seconds": seconds,
        "resolution": resolution,
        "batch": batch,
        "against": words(against),
        "mode": mode,
    }
    given = {name: value for name, value in content.items() if value is not None}
    asked = checked(stage.BenchSettings, given, "qsearch bench")
    if target is None:
        _refuse_alone(output, whole)
        console().print(plain(stage.kernels(asked), "qsearch bench"))
        if rows := stage.products(asked):
            console().print(plain(rows, PRODUCTS))
    elif whole:
        if output is not None:
            raise QSearchError(
                "a latency table is of layers, one by one, and --whole times all at once; leave "
                f"out --whole or --output {output}"
            )
        rows = stage.race(target, asked, typer.echo)
        console().print(plain([_short(row) for row in rows], f"qsearch bench {target} --whole"))
    else:
        path, rows = stage.bench(target, asked, output)
        console().print(plain(rows, f"qsearch bench {target}: ms a call of one layer"))
        typer.echo(f"wrote {path}")
        if output is None:
            typer.echo(
                f"next: qsearch allocate {target} --device {path} --latency SECONDS, with the sum "
                "of its layers' times in mind"
            )


def _refuse_alone(output: Path | None, whole: bool) -> None:
    """What the kernels alone, without a model, can't be asked for."""
    if output is not None:
        raise QSearchError(
            "a latency table is of a model's layers; give a run folder or a card with "
            f"--output {output}"
        )
    if whole:
        raise QSearchError(
            "a whole denoiser has a name; give a run folder or a card with --whole, e.g. "
            "`qsearch bench pixart-alpha --whole`"
        )


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A race's row for a narrow terminal: the range of its times in one column."""
    left = {
        key: value
        for key, value in row.items()
        if key not in ("denoiser", "weights, MiB", "ms", "fastest", "slowest", "runs")
    }
    times = f"{row['ms']:.4g} ({row['fastest']:.4g} to {row['slowest']:.4g})"
    return {
        "denoiser": row["denoiser"],
        "MiB": f"{row['weights, MiB']:.4g}",
        "ms (range)": times,
        **left,
    }


@app.command()
@model_options("metrics")
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
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="a line a layer, not only a role")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            help="OWNER/NAME: make this repository on the hub, with a model card from the run",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="with --push: seen by its owner alone")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="with --push: write the card, send nothing")
    ] = False,
    *,
    given: dict[str, Any],
) -> None:
    """Write the plan as the file that another tool loads."""
    from ..stages.export import ExportSettings
    from ..stages.export import export as stage
    from ..stages.push import PushSettings, check_push
    from ..stages.push import push as send

    if push is None and (private or dry_run):
        raise QSearchError("--private and --dry-run say how --push is done; give --push OWNER/NAME")
    asked = ExportSettings(to=to, output=output, nearest=nearest, force=force, verbose=verbose)
    sent = push and PushSettings(repository=push, private=private, dry_run=dry_run)
    with asked_run(folder, "export", settings_of(given, "calibrate.samples")) as job:
        if sent:
            check_push(job, sent)
        told = [str(path) for path in stage(job, asked)]
        if sent:
            told.append(str(send(job, to, output or job.path(f"export-{to}"), sent)))
    for line in told:
        typer.echo(line)


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
            help="its format: one of `qsearch list importers`, or of exporters; found out "
            "when left out",
        ),
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="take the place of the run's plan or table")
    ] = False,
) -> None:
    """Take another tool's plan (or MixDQ's table) into a run, to measure, explain and beat it."""
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
