"""export: the plan as the file that another tool loads, in export-NAME."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..core.settings import Settings
from ..core.units import size_of
from .announce import begin
from .calibrate import calibration_calls, plan_weights
from .ranges import check_ranges

if TYPE_CHECKING:
    from ..choices.statistics import LayerInputs
    from ..execute.exporting import AbstractExporter
    from .folder import Run

#: what a kept weight takes in a plan
_KEPT_BYTES = 2


class ExportSettings(Settings):
    """For which tool, where to, and what may be done for it."""

    to: str = Field(description="plug-in of `qsearch list exporters`")
    output: Path | None = Field(None, description="folder to make; RUN/export-NAME when left out")
    nearest: bool = Field(False, description="round schemes that the tool lacks to its nearest")
    force: bool = Field(False, description="take the place of an existing folder")
    verbose: bool = Field(False, description="a line a layer instead of one a role")


def export(run: Run, settings: ExportSettings) -> list[Path]:
    """Write the run's plan for another tool, and say what was planned, what was written, and why
    they differ.

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
    check_ranges(run, plan)
    tables = run.tables(graph)
    begin(run, "export")
    options = ExportOptions(
        nearest=settings.nearest,
        force=settings.force,
        table=tables[0] if tables else None,
        variant=run.config.variant,
        sampler_steps=run.sampling.steps,
        say=run.progress.say,
        calibration=_calibration(run, graph, plan, plugin) if plugin.writes_weights else None,
        verbose=settings.verbose,
    )
    folder = settings.output or run.path(f"export-{settings.to}")
    files = verb(plan, graph, run.model_folder, settings.to, folder, options)
    carried = {
        layer.name: plugin.nearest(plan.choices[layer.name][0], layer)
        for layer in graph
        if not graph.components
    }
    for line in accounts(run.model_folder, graph, plan, carried or first_choices(plan), files):
        run.progress.say(line)
    return files


def first_choices(plan: Plan) -> dict[str, Scheme]:
    """Layer -> its scheme in the first range of steps."""
    return {name: held[0] for name, held in plan.weights.items()}


def accounts(
    source: Path,
    graph: OpGraph,
    plan: Plan,
    carried: Mapping[str, Scheme],
    files: Sequence[Path],
) -> list[str]:
    """Planned and written bytes, and what makes the difference, in lines.

    Args:
        source: the saved pipeline.
        graph: its graph.
        plan: what was asked.
        carried: layer -> the scheme that the tool carries out.
        files: what was written.

    Returns:
        The lines: the sizes, the sums by role, and the reasons where the files hold weights.
    """
    from ..measure.sizes import bytes_in, held_in
    from .estimates import denoisers_in

    written = sum(path.stat().st_size for path in files)
    bits = {
        layer.name: carried[layer.name].stored_bits(
            layer.weight_shape, layer.channel_axis, layer.parts
        )
        for layer in graph
    }
    lines = []
    roles: dict[str, list[str]] = {}
    for layer in graph:
        roles.setdefault(layer.role, []).append(layer.name)
    for role, names in sorted(roles.items(), key=lambda item: -sum(bits[n] for n in item[1])):
        used = sorted({str(carried[n]) for n in names})
        shown = ", ".join(used[:3]) + (f" and {len(used) - 3} more" if len(used) > 3 else "")
        size = size_of(sum(bits[n] for n in names) / 8)
        count = f"{len(names)} layer{'s' * (len(names) != 1)}"
        lines.append(f"  {role}: {count}, {size}, {shown}")
    parts = graph.components or denoisers_in(source)
    before = sum(held_in(source / name).bytes for name in parts)
    planned, rounded = plan.achieved.bytes, sum(bits.values()) / 8
    lines.append(
        f"export: {size_of(before)} before, {size_of(planned)} planned, {size_of(written)} written"
    )
    if written < 0.3 * planned:
        lines.append("export: the files say how to quantize; the weights stay where they are")
        return lines
    widths = {n: w for part in parts for n, w in bytes_in(source / part).items()}
    weights = {f"{layer.name}.{layer.parameter}" for layer in graph}
    short = {n.partition(".")[2] for n in weights} if len(graph.components) > 1 else weights
    rest = sum(size for n, (size, _) in widths.items() if n not in short)
    kept = sum(
        layer.weights * (widths[name][1] - _KEPT_BYTES)
        for layer in graph
        if carried[layer.name].format == "keep"
        and (name := f"{layer.name}.{layer.parameter}") in widths
    )
    reasons = [
        (rounded - planned, "schemes that the tool has instead"),
        (rest, "biases, norms and what else no plan counts"),
        (kept, "kept layers in the type of their file instead of 16 bits"),
        (written - rounded - rest - kept, "scales, packing and headers of the tool"),
    ]
    told = [f"{'+' if n > 0 else '-'}{size_of(abs(n))} {why}" for n, why in reasons if abs(n) > 999]
    if told:
        lines.append(f"export: the difference: {'; '.join(told)}")
    return lines


def _calibration(
    run: Run, graph: OpGraph, plan: Plan, plugin: AbstractExporter
) -> Mapping[str, LayerInputs] | None:
    from ..execute.exporting import stores_range
    from ..measure.calibration import calibrate
    from ..measure.components import model_of

    static = {
        layer.name
        for layer in graph
        for scheme in plan.choices[layer.name]
        if stores_range(plugin, plugin.nearest(scheme, layer))
    }
    calls = calibration_calls(run, graph, plan.schemes, always=bool(static))
    if not calls:
        return None
    if run.config.reconstruct.order != "none":
        run.progress.say(
            "export: what reconstruction learnt stays in model.safetensors (`qsearch apply`); here "
            "methods choose by calibration alone"
        )
    held = plan_weights(run, graph, plan, calls, learn=False).calibration
    if missing := static - set(held):
        model = model_of(run.pipe, graph.components)
        seen = calibrate(model, graph, calls, missing, moments=False, some=True)
        held = {**seen, **held}
    return held
