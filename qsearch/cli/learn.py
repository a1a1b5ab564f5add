"""Commands that learn from measured plans: fit, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Address,
    Executor,
    Folder,
    Storage,
    Threads,
    Workers,
    app,
    asked_run,
    console,
    filled,
    parted_by,
    words,
)


@app.command()
def fit(
    folder: Folder,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="what to predict, e.g. sqnr,alignment; all that was measured when left out",
            show_default=False,
        ),
    ] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="one of `qsearch list surrogates`", show_default=False)
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="parts of the cross-validation", show_default=False)
    ] = None,
    storage: Storage = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            help="another run to learn from at once; may be given again", show_default=False
        ),
    ] = None,
    executor: Executor = None,
    workers: Workers = None,
    address: Address = None,
    threads: Threads = 1,
) -> None:
    """Train surrogates on the measured plans, and say how well they predict plans they have not
    seen.
    """
    from ..report.text import plain
    from ..stages.fit import fit as stage
    from ..stages.fit import scores_of

    asked = filled("fit", metrics=words(metrics), surrogate=surrogate, folds=folds)
    with asked_run(folder, "fit", asked) as job:
        by = parted_by(executor, workers, address, threads)
        found = stage(job, storage=storage, also=also or (), by=by)
    console().print(plain(scores_of(found), "held-out predictions"))
    typer.echo(f"wrote {job.path('surrogate')}; next: qsearch explain {folder}")


@app.command()
def explain(
    folder: Folder,
    plan: Annotated[
        Path | None,
        typer.Option(help="the plan to explain; the run's own when left out", show_default=False),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="scheme of the uniform plan to compare with; full precision when left out",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="strongest pairs of layers", show_default=False)
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="layers shown for each metric", show_default=False)
    ] = None,
    storage: Storage = None,
) -> None:
    """Say which choices cost what, with values that add up to the prediction: layers, pairs of
    layers, features, blocks.
    """
    from ..report.explained import attribution_tables
    from ..stages.explain import explain as stage

    asked = filled("explain", baseline=baseline, pairs=pairs, top=top)
    with asked_run(folder, "explain", asked) as job:
        found = stage(job, plan=plan, storage=storage)
    for part in attribution_tables(found, job.config.explain.top, ("layer", "feature")):
        console().print(part, highlight=False)
    typer.echo(f"wrote {job.path('attribution.parquet')}; next: qsearch report {folder}")
