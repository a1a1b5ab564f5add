"""Commands that learn from measured plans: fit, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Address,
    Executor,
    Folder,
    Storage,
    Threads,
    Workers,
    app,
    changed_run,
    console,
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
    """Train surrogates on the measured plans, and say how well they predict plans they have not seen."""
    from ..stages.fit import fit as stage
    from ..stages.fit import scores_of

    asked = {"metrics": words(metrics), "surrogate": surrogate, "folds": folds}
    with changed_run(folder, fit=asked) as job:
        by = parted_by(executor, workers, address, threads)
        found = stage(job, storage=storage, also=also or (), by=by)
        _print("held-out predictions", scores_of(found))


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
    """Say which choices cost what, with values that add up to the prediction: layers, pairs of layers, features, blocks."""
    from ..stages.explain import explain as stage
    from ..stages.explain import largest

    asked = {"baseline": baseline, "pairs": pairs, "top": top}
    with changed_run(folder, explain=asked) as job:
        found = stage(job, plan=plan, storage=storage)
        for title, rows in largest(found, job.config.explain.top).items():
            _print(title, rows)
        console().print(f"wrote {job.path('attribution.parquet')}", highlight=False)


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(
            name, justify="left" if isinstance(value, str) else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console().print(table)
