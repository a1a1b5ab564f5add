"""export: the plan as the file that another tool loads, in export-NAME."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..core.plan import Plan
from ..core.settings import Settings
from .announce import begin
from .calibrate import calibration_calls, plan_weights

if TYPE_CHECKING:
    from ..choices.statistics import LayerInputs
    from .folder import Run


class ExportSettings(Settings):
    """For which tool, where to, and what may be done for it."""

    to: str = Field(description="plug-in of `qsearch list exporters`")
    output: Path | None = Field(None, description="folder to make; RUN/export-NAME when left out")
    nearest: bool = Field(False, description="round schemes that the tool lacks to its nearest")
    force: bool = Field(False, description="take the place of an existing folder")


def export(run: Run, settings: ExportSettings) -> list[Path]:
    """Write the run's plan for another tool.

    Args:
        run: the run, with graph.json and plan.json; its table, where there is one, prices
            roundings.
        settings: the tool and the place.

    Returns:
        The files.

    Raises:
        QSearchError: for a wrong name or a missing package, before anything is read; and as
            `qsearch.export`.
    """
    from ..execute.exports import ExportOptions, exporter
    from ..execute.exports import export as verb

    plugin = exporter(settings.to)
    graph = run.graph()
    plan = Plan.load(run.path("plan.json"), graph)
    tables = run.tables(graph)
    begin(run, "export")
    options = ExportOptions(
        nearest=settings.nearest,
        force=settings.force,
        table=tables[0] if tables else None,
        sampler_steps=run.sampling.steps,
        say=run.progress.say,
        calibration=_calibration(run, plan) if plugin.writes_weights else None,
    )
    folder = settings.output or run.path(f"export-{settings.to}")
    return verb(plan, graph, run.model_folder, settings.to, folder, options)


def _calibration(run: Run, plan: Plan) -> Mapping[str, LayerInputs] | None:
    calls = calibration_calls(run, plan.schemes)
    if not calls:
        return None
    if run.config.reconstruct.order != "none":
        run.progress.say(
            "export: what reconstruction learnt stays in model.safetensors (`qsearch apply`); here "
            "methods choose by calibration alone"
        )
    return plan_weights(run, run.graph(), plan, calls, learn=False).calibration
