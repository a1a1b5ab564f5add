"""report: the run as a page, report.html, and contact_sheet.png beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import write_text
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .evaluate import results_of
from .keys import file_digest, table_key

#: how the page's line about its age begins, while it is new and when it is old
_FRESH, _OLD = '<p class="old" hidden>', '<p class="old">'

if TYPE_CHECKING:
    from ..core.attribution import Attribution
    from .folder import Run


def report(
    run: Run,
    graph: OpGraph,
    table: SensitivityTable,
    plan: Plan,
    rows: Sequence[Mapping[str, Any]],
) -> Path:
    """Write the page, where what it shows has changed.

    What one of its pictures refuses is left out and said: the page of a finished run is not lost
    for it.

    Args:
        run: the run, with the pictures of the plans in `rows`.
        graph: the model's graph.
        table: its sensitivities.
        plan: the run's plan.
        rows: what `evaluate` returned.

    Returns:
        The page.
    """
    from ..report.findings import Findings
    from ..report.page import is_current, write_report
    from .frontier import frontier_of, make_frontier

    settings, explained = run.config.allocate, run.path("attribution.parquet")
    path = run.path("report.html")
    key = run.key(
        "report",
        plan=plan.id,
        table=table_key(table),
        rows=list(rows),
        config=run.config.model_dump(mode="json", exclude={"folder"}),
        explained=file_digest(explained) if explained.is_file() else "",
    )
    if is_current(run.folder, key):
        run.progress.say("report: report.html is up to date")
        return path

    def attempt(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except QSearchError as error:
            run.progress.say(f"report: left out of the page: {error}")
            return None

    curve = attempt(
        lambda: frontier_of(settings, graph, table, make_frontier(settings, graph, table), rows)
    )
    reasons = [
        attempt(lambda: _shapley(graph, table, plan)),
        attempt(lambda: _explained(explained, graph)),
    ]
    captions = run.prompts(run.samples, part=1).texts
    write_report(
        run.folder,
        Findings(
            graph,
            table,
            plan,
            rows,
            captions,
            metric=settings.metric,
            frontier=curve,
            attributions=[r for r in reasons if r is not None],
            target=settings.target,
        ),
        key,
    )
    run.progress.say(f"report: {path}")
    return path


def report_run(run: Run) -> Path:
    """The page of what a run holds; nothing is measured.

    Raises:
        QSearchError: something is missing, or was measured of another plan; with the command that
            makes it.
    """
    graph = run.graph()
    plan = Plan.load(run.path("plan.json"), graph)
    return report(run, graph, run.table(graph), plan, results_of(run, graph, plan))


def measured_report(
    run: Run, graph: OpGraph, plan: Plan, rows: Sequence[Mapping[str, Any]]
) -> Path | None:
    """The page after an evaluation; None, with a word, where the run has no table of
    sensitivities.
    """
    if not run.path("sensitivity.parquet").is_file():
        run.progress.say(
            f"report: none without a table of sensitivities; make one with `qsearch profile "
            f"{run.folder}`"
        )
        return None
    return report(run, graph, run.table(graph), plan, rows)


def mark_old(folder: Path) -> bool:
    """Let a page that was made before the plan changed say so; returns whether there is such a
    page.
    """
    path = folder / "report.html"
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    if _FRESH in text:
        write_text(path, text.replace(_FRESH, _OLD))
    return _FRESH in text or _OLD in text


def _shapley(graph: OpGraph, table: SensitivityTable, plan: Plan) -> Attribution | None:
    """What each layer adds to the plan's predicted error; None where no probes made the table, or
    nothing is quantized.
    """
    from ..learn.shapley import explain_quadratic

    if table.responses is None or all(scheme.format == "keep" for scheme in plan.schemes):
        return None
    return explain_quadratic(
        graph,
        table,
        {"plan": plan},
        metrics=sorted({metric for metric, _ in table.responses.values}),
    )


def _explained(path: Path, graph: OpGraph) -> Attribution | None:
    from ..core.attribution import Attribution

    return Attribution.load(path, graph.id) if path.is_file() else None
