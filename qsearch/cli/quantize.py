"""Commands that measure and plan: run, extract, profile, allocate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.settings import checked
from .common import (
    Address,
    Executor,
    Folder,
    Storage,
    Terminal,
    Threads,
    Workers,
    app,
    changed_run,
    executor_options,
    folder_for,
    parted_by,
    print_table,
    words,
)


@app.command()
def run(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file, e.g. configs/scenes-dit.yaml, or a run folder", show_default=False
        ),
    ],
) -> None:
    """Do the whole job of a config: extract, profile, allocate, evaluate, report."""
    from ..stages.config import load
    from ..stages.run import run as stage

    _show(stage(config, Terminal()), load(Path(config)).gates)


def _show(rows: list[dict[str, Any]], gates: dict[str, str]) -> None:
    """The table of results, and whether the plan keeps its gates: exit code 3 where it does not."""
    from ..stages.gates import check_gates

    print_table(rows)
    if kept := check_gates(gates, rows):
        typer.echo(f"gates kept: {', '.join(kept)}", err=True)


@app.command()
def extract(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="run folder, or a model: name of the zoo (scenes-dit), card (sdxl; see `qsearch list models`), local diffusers "
            "folder or hub id",
            show_default=False,
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
    from ..stages.config import NAME
    from ..stages.extract import extract as stage
    from ..stages.extract import extract_to

    if (Path(target) / NAME).is_file():
        with changed_run(folder_for(target, output)) as job:
            stage(job)
        return
    folder = output or Path("runs") / Path(target).name
    extract_to(folder, target, Terminal(), resolution=resolution, batch=batch, frames=frames)


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
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    threads: Threads = 1,
) -> None:
    """Measure what every choice at every layer costs."""
    from ..stages.extract import extract as read
    from ..stages.profile import profile as stage

    asked: dict[str, Any] = {
        "schemes": words(schemes),
        "metrics": words(metrics),
        "sites": words(sites),
        "autocast": autocast,
        "estimator": estimator,
        "mode": mode,
        "bins": bins,
        "samples": samples,
        "batch": batch,
        "probes": probes,
        "budget_seconds": budget_seconds,
    }
    given = None if prompts is None else str(prompts)
    with changed_run(folder_for(target, output), prompts=given, profile=asked) as job:
        stage(job, read(job), parted_by(executor, workers, address, threads))


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
    steps: Annotated[
        int | None,
        typer.Option(
            help="ranges of sampler steps between which the plan may differ", show_default=False
        ),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier", help="plans from 2.5 to 8 bits instead of one, and a picture of the curve"
        ),
    ] = False,
    passing: Annotated[
        bool,
        typer.Option(
            "--passing",
            help="the smallest plan that keeps the config's gates, by measuring at most 8",
        ),
    ] = False,
) -> None:
    """Find the best plan within a budget; constraints and more limits are set in the run's config.yaml."""
    from ..stages.allocate import allocate as stage
    from ..stages.frontier import frontier as curve
    from ..stages.gates import smallest_passing

    asked = {
        "average_bits": average_bits,
        "latency": latency,
        "device": device,
        "formats": formats,
        "solver": solver,
        "refine": refine,
        "target": target,
        "steps": steps,
    }
    with changed_run(folder, allocate=asked) as job:
        graph = job.graph()
        table = job.table(graph)
        if not passing:
            (curve if frontier else stage)(job, graph, table)
            return
        bits = smallest_passing(job, graph, table)
    with changed_run(folder, allocate={"average_bits": bits}) as job:
        stage(job, graph, table)


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
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    threads: Threads = 1,
    storage: Storage = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC=VALUE: give a plan up that is surely worse; may be given again",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure the plan beside full precision, a uniform and a random one, with common noise; or many plans, to learn from."""
    from ..core.plan import Plan
    from ..stages.campaign import CampaignSettings, limits_of, measure
    from ..stages.evaluate import evaluate as stage

    with changed_run(folder, evaluate={"samples": samples}) as job:
        graph = job.graph()
        if plans is not None or given is not None:
            limits = limits_of(stop or [])
            many = {"plans": plans or 0, "draw": draw, "given": given}
            content = {**many, "storage": storage, "stop": limits}
            asked = checked(CampaignSettings, content, "qsearch evaluate")
            measure(job, graph, asked, executor_options(executor, workers, address, threads))
            return
        rows = stage(job, graph, Plan.load(job.path("plan.json"), graph))
    _show(rows, job.config.gates)
