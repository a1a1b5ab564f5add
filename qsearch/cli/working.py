"""Commands that measure and plan: run, extract, profile, allocate, evaluate; and those that look: show, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import plugins
from ..core.errors import QSearchError
from .common import (
    Folder,
    Terminal,
    app,
    changed_run,
    console,
    folder_for,
    graph_and_table,
    print_table,
)


@app.command()
def run(
    config: Annotated[
        Path, typer.Argument(help="YAML file, e.g. configs/scenes-dit.yaml", show_default=False)
    ],
) -> None:
    """Do the whole job of a config: extract, profile, allocate, evaluate, report."""
    from .. import pipeline
    from ..config import load

    loaded = load(config)
    rows = pipeline.run(loaded, Terminal())
    print_table(rows)


@app.command()
def extract(
    model: Annotated[
        str,
        typer.Argument(
            help="name of the zoo (scenes-dit), card (sdxl; see `qsearch list models`), local diffusers folder or hub id",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="run folder to write to", show_default=False)
    ],
    resolution: Annotated[
        int | None, typer.Option(help="of a card: pixels of the shorter side", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="of a card: pictures at once", show_default=False)
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="of a card: frames of the video", show_default=False)
    ] = None,
) -> None:
    """Read a model's graph: layers with shapes, multiply-accumulates and roles; a card needs no weights."""
    from .. import pipeline

    pipeline.extract_to(
        output, model, Terminal(), resolution=resolution, batch=batch, frames=frames
    )


@app.command()
def profile(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="run folder, or a model as for `extract`", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="of a model: run folder to write to; runs/NAME when left out",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="text file, one prompt a line", show_default=False)
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="choices for each layer, e.g. uint4-c,uint8-c", show_default=False),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="one of `qsearch list estimators`", show_default=False)
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="noise, or some of `qsearch list metrics`, e.g. noise,ssim", show_default=False
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="step or trajectory", show_default=False)] = None,
    bins: Annotated[int | None, typer.Option(help="step bins", show_default=False)] = None,
    samples: Annotated[
        int | None, typer.Option(help="recorded samples a bin", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="samples in one pass", show_default=False)
    ] = None,
    probes: Annotated[
        int | None, typer.Option(help="random vectors a pass", show_default=False)
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="sites of attention too, e.g. '*:softmax,*:q', for schemes such as keep+a8",
            show_default=False,
        ),
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(help="type to compute in: bfloat16 or float16", show_default=False)
    ] = None,
    budget_seconds: Annotated[
        float | None,
        typer.Option(help="stop after this time with what there is", show_default=False),
    ] = None,
) -> None:
    """Measure what every choice at every layer costs."""
    from .. import pipeline

    asked: dict[str, Any] = {
        "schemes": schemes.split(",") if schemes else None,
        "metrics": metrics.split(",") if metrics else None,
    }
    asked |= {
        "sites": sites.split(",") if sites else None,
        "autocast": autocast,
        "estimator": estimator,
        "mode": mode,
        "bins": bins,
        "samples": samples,
        "batch": batch,
        "probes": probes,
        "budget_seconds": budget_seconds,
    }
    with changed_run(
        folder_for(target, output), prompts=None if prompts is None else str(prompts), profile=asked
    ) as job:
        pipeline.profile(job, pipeline.extract(job))


@app.command()
def allocate(
    folder: Folder,
    average_bits: Annotated[
        float | None,
        typer.Option(
            "--average-bits", help="stored bits a weight, scales included", show_default=False
        ),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="seconds of one call on --device", show_default=False)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="one of `qsearch list devices`, or a latency.json that was measured",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[
        int | None, typer.Option(help="at most so many formats in the plan", show_default=False)
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="one of `qsearch list solvers`", show_default=False)
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="rounds of refinement on the model itself", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="one of `qsearch list exporters`: only what that tool can carry out",
            show_default=False,
        ),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier", help="plans from 2.5 to 8 bits instead of one, and a picture of the curve"
        ),
    ] = False,
) -> None:
    """Find the best plan within a budget; constraints and more limits are set in the run's config.yaml."""
    from .. import pipeline

    asked = {
        "average_bits": average_bits,
        "latency": latency,
        "device": device,
        "formats": formats,
        "solver": solver,
        "refine": refine,
        "target": target,
    }
    with changed_run(folder, allocate=asked) as job:
        (pipeline.frontier if frontier else pipeline.allocate)(job, *graph_and_table(job))


@app.command()
def evaluate(
    folder: Folder,
    samples: Annotated[int | None, typer.Option(help="captions", show_default=False)] = None,
    plans: Annotated[
        int | None,
        typer.Option(help="draw and measure so many plans, to learn from", show_default=False),
    ] = None,
    draw: Annotated[
        str,
        typer.Option(
            help="random (as Qua2SeDiMo), latin (roles), or frontier (around the best plans)"
        ),
    ] = "random",
    given: Annotated[
        Path | None,
        typer.Option(help="measure this plan, or all plans in this folder", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(help="processes at once, for many plans")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            help="URL of the trials, for several machines; the run's trials.db when left out",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC=VALUE: give a plan up that is surely worse; may be given again",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the plan beside full precision, a uniform and a random one, with common noise; or many plans, to learn from."""
    from .. import pipeline
    from ..core.graph import OpGraph
    from ..core.plan import BitPlan

    with changed_run(folder, evaluate={"samples": samples}) as job:
        if plans is not None or given is not None:
            from .. import study

            limits = study.limits_of(stop or [])
            study.measure(
                job,
                OpGraph.load(job.path("graph.json")),
                plans or 0,
                draw=draw,
                given=given,
                workers=workers,
                storage=storage,
                stop=limits,
            )
            return
        graph, _ = graph_and_table(job)
        print_table(pipeline.evaluate(job, graph, BitPlan.load(job.path("plan.json"), graph)))


@app.command()
def show(
    artefact: Annotated[
        Path,
        typer.Argument(
            help="graph.json, plan.json, sensitivity.parquet, attribution.parquet, results.json or trials.db",
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
    """Print an artefact of a run; a graph also as a file for other tools, as a picture, and with the time it takes at best; a plan's reasons."""
    from ..core.graph import OpGraph
    from ..report import graph_view
    from ..report.text import show as text

    if block is not None and svg is None:
        raise QSearchError(f"--block chooses what --svg draws; given {block!r} without --svg FILE")
    if why is not None:
        from ..planning import ask_why
        from ..report.why import reasons

        for part in reasons(ask_why(artefact, why)):
            console().print(part)
        return
    if form != "table":
        typer.echo(graph_view.export(OpGraph.load(artefact), form))
    if svg is not None:
        graph_view.save_picture(OpGraph.load(artefact), svg, block)
        typer.echo(f"wrote {svg}")
    if device is not None or (form == "table" and svg is None):
        for part in text(artefact, device):
            console().print(part)


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="models, devices, quantizers, metrics, solvers, …; all when left out",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List models, devices and plug-ins with their captions."""
    from .. import zoo
    from ..core import shipped
    from ..core.errors import nearest

    kinds = sorted([*plugins.KINDS, *shipped.KINDS])
    if kind not in (None, *kinds):
        raise QSearchError(
            f"there is nothing to list by the name of {kind!r}{nearest(str(kind), kinds)}"
        )
    if kind in (None, "models"):
        for name in zoo.NAMES:
            typer.echo(f"{'models':12} {name:16} the zoo's, with weights")
    for one in [kind] if kind else kinds:
        known = shipped if one in shipped.KINDS else plugins
        for name in known.names(one):
            typer.echo(f"{one:12} {name:16} {known.caption(one, name)}")
