"""What becomes of a finished plan: the packed model, another tool's file, and how long this machine takes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import config as configs
from .config import Config
from .core.graph import OpGraph
from .core.latency import Latency
from .core.plan import BitPlan
from .core.table import SensitivityTable
from .job import Run
from .pipeline import calibration_calls, plan_weights


def apply(run: Run, graph: OpGraph, plan: BitPlan, *, required: bool = False) -> Path:
    """The plan's packed model, in model.safetensors."""
    from .execute.packed_file import save
    from .execute.runtime import apply as verb
    from .execute.runtime import packed_layers, stored_bytes
    from .measure.pipelines import denoiser_of

    model = denoiser_of(run.pipe)
    before = sum(2 * parameter.numel() for parameter in model.parameters())
    weights = plan_weights(
        run, graph, plan, calibration_calls(run, plan.layers.values()), learn=True
    )
    verb(model, plan, graph, weights, kernels="required" if required else "preferred")
    path = run.path("model.safetensors")
    save(model, path, graph, plan)
    after = stored_bytes(model) - sum(t.nbytes - 2 * t.numel() for t in model.parameters())
    run.progress.say(
        f"apply: {len(packed_layers(model))} packed layers, the model takes {after:,} bytes, {before / after:.2f} times less than in 16 bits; {path}"
    )
    return path


def bench(
    target: str,
    schemes: list[str],
    *,
    device: str = "cpu",
    seconds: float = 0.3,
    resolution: int | None = None,
) -> tuple[Latency, list[dict[str, Any]]]:
    """The measured latency table of a run folder's model, or of a card, and a row for each shape of layer."""
    from .execute.timing import time_layers

    model, graph, inputs = _subject(target, resolution)
    return time_layers(model, graph, inputs, schemes, device=device, seconds=seconds)


def race(
    target: str,
    schemes: list[str],
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    resolution: int | None = None,
    batch: int = 1,
    compiled: bool = True,
    mode: str = "default",
    against: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Whole calls of a denoiser: full precision, uniform plans of `schemes`, the run's own plan and other tools, a row each (see `race_denoisers`)."""
    from .execute.denoisers import race_denoisers, uniform

    model, graph, inputs = _subject(target, resolution, batch)
    plans = uniform(graph, schemes)
    if (own := Path(target) / "plan.json").is_file():
        plans["plan.json"] = BitPlan.load(own, graph).layers
    rules: dict[str, Any] = {"compiled": compiled, "mode": mode, "against": against, "say": say}
    return race_denoisers(model, graph, inputs, plans, device=device, seconds=seconds, **rules)


def _subject(
    target: str, resolution: int | None, batch: int = 1
) -> tuple[Any, OpGraph, dict[str, Any]]:
    """(denoiser, its graph, arguments of one call) of a run folder, a card or a pipeline; of a card all on the meta device."""
    from .graphs.extraction import extract as verb
    from .graphs.families import cards
    from .measure.pipelines import denoiser_of, example_inputs, record

    folder = Path(target)
    name = (
        configs.load(folder / "config.yaml").model if (folder / "config.yaml").is_file() else target
    )
    if cards.has(name):
        model, inputs = cards.load(name, resolution=resolution, batch=batch)
    else:
        run = Run(
            configs.load(folder / "config.yaml")
            if name != target
            else Config(model=name, folder=folder)
        )
        [call] = record(
            run.pipe,
            run.prompts(batch, part=0),
            replace(run.sampling, steps=2, batch=batch),
            bins=1,
        )
        model = denoiser_of(run.pipe)
        inputs = example_inputs(call, model)
    graph = (
        OpGraph.load(folder / "graph.json") if name != target else verb(model, inputs, name=name)
    )
    return model, graph, inputs


def export(
    run: Run, to: str, output: Path | None = None, *, nearest: bool = False, force: bool = False
) -> list[Path]:
    """The run's plan as the file of the tool `to`, in `output` or export-NAME of the run; roundings are priced by its table, where there is one."""
    from .core.stepplan import StepPlan
    from .execute.exports import export as verb
    from .execute.exports import exporter

    plugin = exporter(to)  # a wrong name or a missing package is said before anything is read
    graph = OpGraph.load(run.path("graph.json"))
    plan = BitPlan.load(run.path("plan.json"), graph)
    table = (
        SensitivityTable.load(run.path("sensitivity.parquet"), graph.id)
        if run.path("sensitivity.parquet").is_file()
        else None
    )
    steps = (
        StepPlan.load(run.path("stepplan.json"), graph)
        if run.path("stepplan.json").is_file()
        else None
    )
    rules: dict[str, Any] = {
        "nearest": nearest,
        "force": force,
        "table": table,
        "steps": steps,
        "say": run.progress.say,
    }
    rules["sampler_steps"] = run.config.sampling.steps
    if plugin.writes_weights and (calls := calibration_calls(run, plan.layers.values())):
        rules["calibration"] = plan_weights(run, graph, plan, calls, learn=False).calibration
        if run.config.reconstruct.order != "none":
            run.progress.say(
                "export: what reconstruction learnt stays in model.safetensors (`qsearch apply`); here methods choose by calibration alone"
            )
    return verb(plan, graph, run.model_folder, to, output or run.path(f"export-{to}"), **rules)
