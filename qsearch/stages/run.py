"""run: a config end to end: extract, profile, allocate, evaluate, report; nothing is done twice."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.progress import Progress, Silent
from .allocate import allocate
from .announce import begin
from .checks import check_run
from .config import NAME, Config, load, save
from .evaluate import evaluate
from .extract import extract
from .folder import Run
from .lock import locked
from .plans import plan_by_hand
from .profile import profile
from .report import report


def run(config: Config | Path | str, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The whole job.

    Args:
        config: a config, the path of one, or a run's folder.
        progress: who is told.

    Returns:
        The rows of the table that compares the plans.

    Raises:
        QSearchError: before any work, for a model, prompts, metrics or a budget that don't do.
    """
    loaded = load(Path(config)) if isinstance(config, str | Path) else config
    run = Run(loaded, progress or Silent())
    check_run(run)  # before anything is written
    with suppress(OSError):  # writing the config says what is wrong
        run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder, "run"):
        save(run.config, run.path(NAME))
        return job(run)


def job(job: Run) -> list[dict[str, Any]]:
    """The whole job in a run's folder, as `run`."""
    from ..decide.building import check_budget

    job.whole = True
    begin(job, "extract", "profile", "evaluate")
    graph = extract(job)
    settings = job.config.allocate
    if settings.layers:
        plan_by_hand(graph, settings.layers, settings.ranges)
    else:  # before minutes of work, not after
        schemes = job.config.profile.schemes
        check_budget(graph, settings.budget, schemes, constraints=settings.constraints)
    table = profile(job, graph)
    plan = allocate(job, graph, table, keep=True)
    rows = evaluate(job, graph, plan)
    report(job, graph, table, plan, rows)
    target = job.config.allocate.target or "torchao"
    job.progress.say(
        f"next: open {job.path('report.html')}; qsearch export {job.folder} --to {target}"
    )
    return rows
