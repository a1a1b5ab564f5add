"""Commands that measure and plan: run, extract, profile, allocate, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import QSearchError
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
    asked_run,
    executor_options,
    filled,
    parted_by,
    place_for,
    print_table,
    words,
)
from .options import model_options, settings_of


@app.command()
@model_options()
def run(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file, e.g. of `qsearch init`, or a run folder", show_default=False
        ),
    ],
    *,
    given: dict[str, Any],
) -> None:
    """Do the whole job of a config: extract, profile, allocate, evaluate, report."""
    from ..stages.checks import check_run
    from ..stages.config import NAME, changed, load, save
    from ..stages.folder import Run
    from ..stages.run import job as stage

    kept = load(config)
    folder = kept.folder or Path("runs")
    asked = settings_of(given, "evaluate.samples", "evaluate.metrics")
    if not config.is_dir():
        check_run(Run(changed(kept, asked, "the command line")))  # before anything is written
        save(kept, folder / NAME)
    with asked_run(folder, "run", asked) as job:
        rows = stage(job)
    _show(rows, job.config.gates)


def _show(rows: list[dict[str, Any]], gates: dict[str, str]) -> None:
    """The table of results, and whether the plan keeps its gates: exit code 3 where it does not."""
    from ..stages.gates import check_gates

    print_table(rows)
    if kept := check_gates(gates, rows):
        Terminal().say(f"gates kept: {', '.join(kept)}")


@app.command()
@model_options("metrics", "samples")
def extract(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="run folder, or a model: name of the zoo (scenes-dit), card (sdxl; see "
            "`qsearch list models`), local diffusers folder or hub id",
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
    components: Annotated[
        str | None,
        typer.Option(
            help="of a pipeline: which are planned, e.g. transformer,text_encoder,vae; its "
            "denoisers when left out",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="of a card: pixels of the shorter side", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="of a card: pictures at once", show_default=False)
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Read a model's graph: layers, shapes, multiply-accumulates, roles; a card has no weights."""
    from ..stages.extract import extract as stage
    from ..stages.extract import extract_card, is_card

    size = {"resolution": resolution, "batch": batch}
    if is_card(target):
        frames = given.pop("frames", None)
        given |= {} if components is None else {"components": components}
        if given:
            raise QSearchError(
                f"{target} is a card, shapes without weights, which takes --resolution, --batch "
                f"and --frames; given --{next(iter(given))}"
            )
        folder = output or Path("runs") / Path(target).stem
        extract_card(folder, target, Terminal(), frames=frames, **size)
        return
    asked = [name for name, value in size.items() if value is not None]
    if asked:
        raise QSearchError(
            f"--{asked[0]} is for cards, a pipeline is read as it runs (--height, --width); given "
            f"with {target}"
        )
    asked_of = settings_of(given, "") | {"components": words(components)}
    with asked_run(place_for(target, output), "extract", asked_of) as job:
        stage(job)


@app.command()
@model_options()
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
    components: Annotated[
        str | None,
        typer.Option(help="which are planned, as for `extract`", show_default=False),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="choices for each layer, e.g. uint4-c,uint8-c", show_default=False),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="one of `qsearch list estimators`", show_default=False)
    ] = None,
    mode: Annotated[str | None, typer.Option(help="step or trajectory", show_default=False)] = None,
    bins: Annotated[int | None, typer.Option(help="step bins", show_default=False)] = None,
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
        typer.Option(
            help="stop after this time with what there is (by probes; a sweep needs its time)",
            show_default=False,
        ),
    ] = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    threads: Threads = 1,
    *,
    given: dict[str, Any],
) -> None:
    """Measure what every choice at every layer costs."""
    from ..stages.announce import begin
    from ..stages.extract import extract as read
    from ..stages.profile import profile as stage

    asked = filled(
        "profile",
        schemes=words(schemes),
        sites=words(sites),
        autocast=autocast,
        estimator=estimator,
        mode=mode,
        bins=bins,
        batch=batch,
        probes=probes,
        budget_seconds=budget_seconds,
    )
    asked |= settings_of(given, "profile.samples", "profile.metrics")
    asked |= {"components": words(components)}
    with asked_run(place_for(target, output), "profile", asked) as job:
        begin(job, "profile")
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
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            help="stored bytes of all weights, or their share of what they take in 16 bits: 40%",
            show_default=False,
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
    quick: Annotated[
        bool, typer.Option("--quick", help="guess from a model's files alone; nothing is measured")
    ] = False,
    schemes: Annotated[
        str | None, typer.Option(help="with --quick: choices for each layer", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="with --quick: a model's run folder", show_default=False)
    ] = None,
) -> None:
    """Find the best plan within a budget; more limits and constraints: the run's config.yaml."""
    from ..stages.allocate import allocate as stage
    from ..stages.config import NAME, changed, load, save
    from ..stages.frontier import frontier as curve
    from ..stages.gates import smallest_passing

    asked = filled(
        "allocate",
        average_bits=average_bits,
        bytes=int(size) if size is not None and size.isdigit() else size,
        latency=latency,
        device=device,
        formats=formats,
        solver=solver,
        refine=refine,
        target=target,
        steps=steps,
    )
    if not quick and (schemes, output) != (None, None):
        raise QSearchError(
            "--schemes and --output go with --quick; a run's table has its own schemes"
        )
    if quick:
        from ..stages.extract import extract as read
        from ..stages.quick import quick as guessed

        asked |= {"profile.schemes": words(schemes)}
        with asked_run(place_for(str(folder), output), "allocate", asked) as job:
            guessed(job, read(job))
        return
    with asked_run(folder, "allocate", asked) as job:
        graph = job.graph()
        table = job.table(graph)
        if not passing:
            (curve if frontier else stage)(job, graph, table)
            return
        bits = smallest_passing(job, graph, table)
    kept = changed(load(folder), {"allocate.average_bits": bits}, "--passing")
    save(kept, folder / NAME)  # the budget that passes is the run's from here on
    with asked_run(folder, "allocate", asked) as job:
        stage(job, graph, table)


@app.command()
@model_options()
def evaluate(
    folder: Folder,
    plans: Annotated[
        int | None,
        typer.Option(help="draw and measure so many plans, to learn from", show_default=False),
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            help="with --plans: random (as Qua2SeDiMo), latin (roles), or frontier (around the "
            "best plans); random when left out",
            show_default=False,
        ),
    ] = None,
    given_plans: Annotated[
        Path | None,
        typer.Option(
            "--given", help="measure this plan, or all plans in this folder", show_default=False
        ),
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
    *,
    given: dict[str, Any],
) -> None:
    """Measure the plan beside full precision, a uniform and a random one; or many plans."""
    from ..core.plan import Plan
    from ..stages.evaluate import evaluate as stage
    from ..stages.evaluate_plans import EvaluatePlansSettings, limits_of, measure
    from ..stages.report import measured_report as page

    if plans is None and given_plans is None and (draw, stop, storage) != (None, None, None):
        raise QSearchError(
            "--draw, --stop and --storage are of many plans; give --plans NUMBER or --given FILE"
        )
    asked = settings_of(given, "evaluate.samples", "evaluate.metrics")
    many = plans is not None or given_plans is not None
    with asked_run(folder, "evaluate", asked, together=many) as job:
        graph = job.graph()
        if many:
            limits = limits_of(stop or [])
            chosen = {"plans": plans or 0, "draw": draw or "random", "given": given_plans}
            content = {**chosen, "storage": storage, "stop": limits}
            by = executor_options(executor, workers, address, threads)
            measure(job, graph, checked(EvaluatePlansSettings, content, "qsearch evaluate"), by)
            return
        plan = Plan.load(job.path("plan.json"), graph)
        rows = stage(job, graph, plan)
        page(job, graph, plan, rows)
    _show(rows, job.config.gates)
