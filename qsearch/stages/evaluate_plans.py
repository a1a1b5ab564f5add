"""evaluate --plans: many plans measured for surrogates to learn from, into the run's trials.

Drawn plans of the run's schemes, or plans that are given as files. What is measured before is not
measured again; several processes or machines may do it at once, by an executor or by the same
command with the same storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..core.artifacts import without_secrets
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.settings import Settings
from ..core.storage import storage_url
from .announce import begin
from .evaluate import setting_of
from .ranges import check_ranges

if TYPE_CHECKING:
    from ..measure.executing import ExecutorOptions
    from .folder import Run


class EvaluatePlansSettings(Settings):
    """Which plans are measured, by how many, and where they are kept."""

    plans: int = Field(0, ge=0, description="drawn plans of the run's schemes")
    draw: str = Field("random", description="random, latin (roles) or frontier (around the best)")
    given: Path | None = Field(None, description="a plan, or a folder of plans, instead")
    storage: str | None = Field(
        None,
        repr=False,
        description="URL of the trials, env:NAME or file:PATH that holds it; the run's trials.db "
        "when left out",
    )
    stop: dict[str, float] = Field(
        {}, description="metric -> value by which a plan is stopped early"
    )


def measure(
    run: Run, graph: OpGraph, settings: EvaluatePlansSettings, by: ExecutorOptions | None = None
) -> int:
    """Measure many plans.

    Args:
        run: the run, with its graph and, for draws around the frontier, its table.
        graph: the model's graph.
        settings: which plans, and how.
        by: executor and workers; one after the other here when left out.

    Returns:
        How many were measured now.

    Raises:
        QSearchError: where no plan of several could be measured, for what is given wrongly.
    """
    from ..decide.draws import draw as draw_plans
    from ..measure.plan_evaluation import EvaluationTask, measure_plans
    from .calibrate import calibration_question

    c = run.config
    if settings.given is not None:
        plans = plans_in(settings.given, graph)
    else:
        tables = run.tables(graph)
        table = tables[0] if tables else None
        plans = draw_plans(
            graph, run.offered(graph), settings.plans, settings.draw, seed=c.seed, table=table
        )
    for plan in plans.values():
        check_ranges(run, plan)
    chosen_by = calibration_question(run, (), always=True)
    # trials of 0.1.0 have this word in their keys
    setting = setting_of(run, "campaign", graph=graph.id, **chosen_by)
    begin(run, "evaluate")
    where = run.path("trials.db") if settings.storage is None else storage_url(settings.storage)
    task = EvaluationTask(
        run.model_folder,
        graph,
        setting,
        where,
        run.device,
        settings.stop,
        run.dtype,
        variant=run.config.variant,
        offload=run.offload.kind,
    )
    with run.progress.track("evaluate", len(plans)) as advance:
        done = measure_plans(task, plans, by, progress=advance, say=run.progress.say)
    run.progress.say(
        f"evaluate: {done} plan{'s' * (done != 1)} measured, {len(plans) - done} of {len(plans)} "
        f"were there or passed over; all in {without_secrets(str(where))}"
    )
    return done


def plans_in(path: Path, graph: OpGraph) -> Mapping[str, Plan]:
    """The plan of a file, or those of all `*.json` in a folder, by their names."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise QSearchError(
            f"{path} holds no plans; give a plan.json, or a folder of them such as RUN/frontier"
        )
    return {file.stem: Plan.load(file, graph) for file in files}


def limits_of(asked: Sequence[str]) -> dict[str, float]:
    """`["sqnr=3"]` as metric -> value. Raises `QSearchError` for what is neither."""
    found = {}
    for text in asked:
        metric, _, value = text.partition("=")
        try:
            found[metric] = float(value)
        except ValueError:
            raise QSearchError(
                f"a plan is stopped early by METRIC=VALUE, e.g. sqnr=3; given {text!r}"
            ) from None
    return found
