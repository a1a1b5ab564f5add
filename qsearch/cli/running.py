"""Commands that run a plan: apply, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import QSearchError
from .common import Folder, app, changed_run, console


@app.command()
def apply(
    folder: Folder,
    required: Annotated[
        bool,
        typer.Option(
            "--required",
            help="refuse layers whose low-bit arithmetic this machine has no kernel for",
        ),
    ] = False,
) -> None:
    """Write the plan's packed model, model.safetensors: smaller in memory, not only on disk."""
    from .. import delivery
    from ..core.graph import OpGraph
    from ..core.plan import BitPlan

    with changed_run(folder) as job:
        graph = OpGraph.load(job.path("graph.json"))
        delivery.apply(job, graph, BitPlan.load(job.path("plan.json"), graph), required=required)


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
        str, typer.Option(help="choices to time, e.g. uint4-c,int8-c+a8")
    ] = "keep,uint4-c,int8-c+a8",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="latency.json for `allocate --device`; in a run folder when left out",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    seconds: Annotated[float, typer.Option(help="for each thing that is timed")] = 0.3,
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
    batch: Annotated[int, typer.Option(help="with --whole: pictures at once")] = 1,
    against: Annotated[
        str | None,
        typer.Option(
            help="with --whole: peers, e.g. fp32,torchao-w8a8; all that are installed when left out",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="with --whole: of torch.compile: default, reduce-overhead (CUDA graphs), max-autotune, or none"
        ),
    ] = "default",
) -> None:
    """Time the kernels on this machine, or every layer of a model, as a latency table for `allocate`; or whole denoisers, with other tools beside."""
    from .. import delivery
    from ..execute import timing
    from ..report.text import plain

    if target is None:
        if output is not None or whole:
            what = (
                f"a latency table is of a model's layers; give a run folder or a card with --output {output}"
                if output
                else "a whole denoiser has a name"
            )
            raise QSearchError(
                what
                if output
                else f"{what}; give a run folder or a card with --whole, e.g. `qsearch bench pixart-alpha --whole`"
            )
        console().print(plain(timing.kernels(device, seconds), "qsearch bench"))
        return
    if whole:
        if output is not None:
            raise QSearchError(
                f"a latency table is of layers, one by one, and --whole times all at once; leave out --whole or --output {output}"
            )
        peers = None if against is None else [name for name in against.split(",") if name]
        rules: dict[str, Any] = {
            "compiled": mode != "none",
            "mode": mode,
            "against": peers,
            "say": typer.echo,
        }
        rows = delivery.race(
            target,
            schemes.split(","),
            device=device,
            seconds=seconds,
            resolution=resolution,
            batch=batch,
            **rules,
        )
        console().print(plain([_short(row) for row in rows], f"qsearch bench {target} --whole"))
        return
    latency, rows = delivery.bench(
        target, schemes.split(","), device=device, seconds=seconds, resolution=resolution
    )
    path = output or Path(target) / "latency.json"
    if output is None and not Path(target).is_dir():
        raise QSearchError(
            f"the latency table of a card needs a place; give --output, e.g. --output {target}-latency.json"
        )
    latency.save(path)
    console().print(plain(rows, f"qsearch bench {target}"))
    typer.echo(f"wrote {path}")


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
