"""bench: how long this machine takes: kernels, every layer of a model, or whole denoisers in a
race.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.plan import Plan
from ..core.settings import Settings
from ..core.table import SensitivityTable
from .config import NAME, Config, load
from .extract import example
from .folder import Run

#: what is timed where nothing is asked and no run says
DEFAULT = ("keep", "uint4-c", "int8-c+a8")


class BenchSettings(Settings):
    """What is timed, and for how long; of a race also who takes part, and how they are compiled."""

    schemes: tuple[str, ...] | None = Field(
        None,
        description="choices to time; keep and those of the run's table and plan when left out, "
        "without a run uint4-c and int8-c+a8",
    )
    device: str = Field("cpu", description="torch device")
    seconds: float = Field(0.3, ge=0, description="for each thing that is timed")
    resolution: int | None = Field(None, description="of a card: pixels of the shorter side")

    batch: int = Field(1, ge=1, description="of a race: pictures at once")
    against: tuple[str, ...] | None = Field(
        None,
        description="of a race: peers, e.g. fp32,torchao-w8a8; all installed ones when left out",
    )
    mode: str = Field(
        "default",
        description="of a race: mode of torch.compile: default, reduce-overhead (CUDA graphs), "
        "max-autotune, none",
    )


def kernels(settings: BenchSettings) -> list[dict[str, Any]]:
    """Rows of the kernels' own benchmark on this machine."""
    from ..race.timing import kernels as verb

    return verb(settings.device, settings.seconds)


def products(settings: BenchSettings) -> list[dict[str, Any]]:
    """What serves each scheme on this CPU and its worth (`execute.slower.products_here`); nothing
    for another device.
    """
    from ..execute.slower import products_here

    return products_here() if settings.device == "cpu" else []


def bench(
    target: str, settings: BenchSettings, output: Path | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """Time every layer of a model.

    Args:
        target: a run folder, a card or a pipeline.
        settings: schemes, device, seconds.
        output: the latency table's file; latency.json of a run folder when left out.

    Returns:
        The file, and a row for each shape of layer.

    Raises:
        QSearchError: where a card's table has no place.
    """
    from ..race.timing import time_layers

    if output is None and not Path(target).is_dir():
        raise QSearchError(
            "the latency table of a card needs a place; give --output, e.g. "
            f"--output {target}-latency.json"
        )
    model, graph, inputs = _subject(target, settings.resolution)
    schemes = settings.schemes or own_schemes(target, graph)
    made: tuple[Latency, list[dict[str, Any]]] = time_layers(
        model, graph, inputs, schemes, device=settings.device, seconds=settings.seconds
    )
    path = output or Path(target) / "latency.json"
    made[0].save(path)
    return path, made[1]


def own_schemes(target: str, graph: OpGraph) -> tuple[str, ...]:
    """What a run may choose from: `keep`, the schemes of its table, those of its plan; `DEFAULT`
    where it has neither.
    """
    folder = Path(target)
    found: dict[str, None] = {}
    if (folder / "sensitivity.parquet").is_file():
        table = SensitivityTable.load(folder / "sensitivity.parquet", graph.id)
        sites = {layer.name for layer in graph}
        rows = table.frame[table.frame["site"].isin(sites)]
        found |= dict.fromkeys(map(str, rows["scheme"].unique()))
    if (folder / "plan.json").is_file():
        plan = Plan.load(folder / "plan.json", graph)
        found |= dict.fromkeys(str(s) for held in plan.weights.values() for s in held)
    found.pop("keep", None)
    return ("keep", *found) if found else DEFAULT


def race(
    target: str, settings: BenchSettings, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Whole calls of a denoiser, a row each.

    Args:
        target: a run folder, a card or a pipeline.
        settings: who takes part, on what.
        say: called with what is left out, and what is compiled.

    Returns:
        Full precision, uniform plans of the schemes, the run's own plan and other tools (see
        `race_denoisers`).
    """
    from ..race.denoisers import RaceOptions, race_denoisers, uniform

    model, graph, inputs = _subject(target, settings.resolution, settings.batch)
    plans = uniform(graph, settings.schemes or DEFAULT)
    if (own := Path(target) / "plan.json").is_file():
        plans["plan.json"] = Plan.load(own, graph).layers
    options = RaceOptions(
        device=settings.device,
        seconds=settings.seconds,
        compiled=settings.mode != "none",
        mode=settings.mode,
        against=settings.against,
        say=say,
    )
    return race_denoisers(model, graph, inputs, plans, options)


def _subject(
    target: str, resolution: int | None, batch: int = 1
) -> tuple[Any, OpGraph, dict[str, Any]]:
    """(denoiser, its graph, arguments of one call); of a card all on the meta device."""
    from ..graphs.extraction import extract as verb
    from ..graphs.families import cards

    folder = Path(target)
    kept = (folder / NAME).is_file()
    config = load(folder) if kept else Config(model=target, folder=folder)
    name = config.model
    if cards.has(name):
        model, inputs = cards.load(name, resolution=resolution, batch=batch)
    else:
        model, inputs = example(Run(config.model_copy(update={"offload": "none"})), batch)
    graph = OpGraph.load(folder / "graph.json") if kept else verb(model, inputs, name=name)
    return model, graph, inputs
