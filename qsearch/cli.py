"""The `qsearch` command: argv -> one verb call each; no arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .core import plugins
from .core.errors import QSearchError

if TYPE_CHECKING:
    from .job import Run

app = typer.Typer(
    name="qsearch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which layers of a diffusion model stand few bits, why, and what to do.",
)
Folder = Annotated[Path, typer.Argument(help="run folder, made by `qsearch extract` or `qsearch run`", show_default=False)]
_LATER = {
    "fit": "train a surrogate on the measured plans",
    "explain": "say which choices pay off, with values that add up",
    "apply": "write the quantized model",
    "export": "write a plan as another tool's file",
    "bench": "time the kernels on this machine",
}


class _Terminal:
    """Progress on the terminal: lines, and bars with the time left; plain lines where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda n: bars.advance(task, n)


@contextmanager
def _changed(folder: Path, **changes: dict[str, Any] | str | None) -> Iterator[Run]:
    """The run in `folder` with the given keys of its config changed; saved so when the work on it is done."""
    from . import config as configs
    from .job import Run

    config = configs.load(folder / "config.yaml")
    content = config.model_dump(mode="json") | {"folder": str(folder)}
    for name, given in changes.items():
        if isinstance(given, dict):
            content[name] = content[name] | {k: v for k, v in given.items() if v is not None}
        elif given is not None:
            content[name] = given
    changed = configs.parse(content, "the command line")
    yield Run(changed, _Terminal())
    configs.save(changed, folder / "config.yaml")


def _folder_for(target: str, output: Path | None = None) -> Path:
    """The run folder that `target` is, or, for a model, a run folder of its own (`output`, or runs/NAME) with a config that names it."""
    from . import config as configs
    from .job import Run

    if (Path(target) / "config.yaml").is_file():
        if output is not None:
            raise QSearchError(f"{target} is a run folder, its files stay in it; give --output with a model")
        return Path(target)
    folder = output or Path("runs") / Path(target).name
    if (folder / "config.yaml").is_file():
        known = configs.load(folder / "config.yaml").model
        if known != target:
            raise QSearchError(f"{folder} is a run of {known}, not of {target}; give another folder with --output")
        return folder
    job = Run(configs.Config(model=target, folder=folder))
    _ = job.model_folder  # a wrong name is said before anything is written
    configs.save(job.config, job.path("config.yaml"))
    return folder


def _graph_and_table(job: Run) -> tuple[Any, Any]:
    from .core.graph import OpGraph
    from .core.table import SensitivityTable

    graph = OpGraph.load(job.path("graph.json"))
    return graph, SensitivityTable.load(job.path("sensitivity.parquet"), graph.id)


@app.command()
def run(config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/scenes-dit.yaml", show_default=False)]) -> None:
    """Do the whole job of a config: extract, profile, allocate, evaluate, report."""
    from . import pipeline
    from .config import load

    loaded = load(config)
    rows = pipeline.run(loaded, _Terminal())
    _table(rows)


@app.command()
def extract(
    model: Annotated[
        str, typer.Argument(help="name of the zoo (scenes-dit), card (sdxl; see `qsearch list models`) or local diffusers folder", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="run folder to write to", show_default=False)],
    resolution: Annotated[int | None, typer.Option(help="of a card: pixels of the shorter side", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="of a card: pictures at once", show_default=False)] = None,
    frames: Annotated[int | None, typer.Option(help="of a card: frames of the video", show_default=False)] = None,
) -> None:
    """Read a model's graph: layers with shapes, multiply-accumulates and roles; a card needs no weights."""
    from . import pipeline

    pipeline.extract_to(output, model, _Terminal(), resolution=resolution, batch=batch, frames=frames)


@app.command()
def profile(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="run folder, or a model as for `extract`", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="of a model: run folder to write to; runs/NAME when left out", show_default=False)
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file, one prompt a line", show_default=False)] = None,
    schemes: Annotated[str | None, typer.Option(help="choices for each layer, e.g. uint4-c,uint8-c", show_default=False)] = None,
    estimator: Annotated[str | None, typer.Option(help="one of `qsearch list estimators`", show_default=False)] = None,
    metrics: Annotated[str | None, typer.Option(help="noise, or some of `qsearch list metrics`, e.g. noise,ssim", show_default=False)] = None,
    mode: Annotated[str | None, typer.Option(help="step or trajectory", show_default=False)] = None,
    bins: Annotated[int | None, typer.Option(help="step bins", show_default=False)] = None,
    samples: Annotated[int | None, typer.Option(help="recorded samples a bin", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="samples in one pass", show_default=False)] = None,
    probes: Annotated[int | None, typer.Option(help="random vectors a pass", show_default=False)] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="stop after this time with what there is", show_default=False)] = None,
) -> None:
    """Measure what every choice at every layer costs."""
    from . import pipeline

    asked: dict[str, Any] = {"schemes": schemes.split(",") if schemes else None, "metrics": metrics.split(",") if metrics else None}
    asked |= {"estimator": estimator, "mode": mode, "bins": bins, "samples": samples, "batch": batch, "probes": probes, "budget_seconds": budget_seconds}
    with _changed(_folder_for(target, output), prompts=None if prompts is None else str(prompts), profile=asked) as job:
        pipeline.profile(job, pipeline.extract(job))


@app.command()
def allocate(
    folder: Folder,
    average_bits: Annotated[float | None, typer.Option("--average-bits", help="stored bits a weight, scales included", show_default=False)] = None,
    latency: Annotated[float | None, typer.Option(help="seconds of one call on --device", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="one of `qsearch list devices`, or a latency.json that was measured", show_default=False)] = None,
    formats: Annotated[int | None, typer.Option(help="at most so many formats in the plan", show_default=False)] = None,
    solver: Annotated[str | None, typer.Option(help="one of `qsearch list solvers`", show_default=False)] = None,
    frontier: Annotated[bool, typer.Option("--frontier", help="plans from 2.5 to 8 bits instead of one, and a picture of the curve")] = False,
) -> None:
    """Find the best plan within a budget; constraints and more limits are set in the run's config.yaml."""
    from . import pipeline

    asked = {"average_bits": average_bits, "latency": latency, "device": device, "formats": formats, "solver": solver}
    with _changed(folder, allocate=asked) as job:
        (pipeline.frontier if frontier else pipeline.allocate)(job, *_graph_and_table(job))


@app.command()
def evaluate(folder: Folder, samples: Annotated[int | None, typer.Option(help="captions", show_default=False)] = None) -> None:
    """Measure the plan beside full precision, a uniform and a random one, with common noise."""
    from . import pipeline
    from .core.plan import BitPlan

    with _changed(folder, evaluate={"samples": samples}) as job:
        graph, _ = _graph_and_table(job)
        _table(pipeline.evaluate(job, graph, BitPlan.load(job.path("plan.json"), graph)))


@app.command()
def show(
    artefact: Annotated[Path, typer.Argument(help="graph.json, plan.json, sensitivity.parquet, results.json or trials.db", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="table; of a graph also graphml, dot or json")] = "table",
    device: Annotated[str | None, typer.Option(help="of a graph: time at best on one of `qsearch list devices`", show_default=False)] = None,
    svg: Annotated[Path | None, typer.Option(help="of a graph: write a picture, .svg or .png", show_default=False)] = None,
    block: Annotated[str | None, typer.Option(help="of a graph: the picture is of this block, else of the whole", show_default=False)] = None,
    why: Annotated[str | None, typer.Option(help="of a plan: the choices of this layer, and what another one would cost", show_default=False)] = None,
) -> None:
    """Print an artefact of a run; a graph also as a file for other tools, as a picture, and with the time it takes at best; a plan's reasons."""
    from .core.graph import OpGraph
    from .report import graph_view
    from .report.text import show as text

    if block is not None and svg is None:
        raise QSearchError(f"--block chooses what --svg draws; given {block!r} without --svg FILE")
    if why is not None:
        from .planning import ask_why
        from .report.why import reasons

        for part in reasons(ask_why(artefact, why)):
            _console().print(part)
        return
    if form != "table":
        typer.echo(graph_view.export(OpGraph.load(artefact), form))
    if svg is not None:
        graph_view.save_picture(OpGraph.load(artefact), svg, block)
        typer.echo(f"wrote {svg}")
    if device is not None or (form == "table" and svg is None):
        for part in text(artefact, device):
            _console().print(part)


@app.command(name="list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="models, devices, quantizers, metrics, solvers, …; all when left out", show_default=False)] = None,
) -> None:
    """List models, devices and plug-ins with their captions."""
    from . import zoo
    from .core import shipped
    from .core.errors import nearest

    kinds = sorted([*plugins.KINDS, *shipped.KINDS])
    if kind not in (None, *kinds):
        raise QSearchError(f"there is nothing to list by the name of {kind!r}{nearest(str(kind), kinds)}")
    if kind in (None, "models"):
        for name in zoo.NAMES:
            typer.echo(f"{'models':12} {name:16} the zoo's, with weights")
    for one in [kind] if kind else kinds:
        known = shipped if one in shipped.KINDS else plugins
        for name in known.names(one):
            typer.echo(f"{one:12} {name:16} {known.caption(one, name)}")


def _later(verb: str, help_: str) -> None:
    def stub() -> None:
        raise QSearchError(
            f"{verb} is not built yet; built are {', '.join(sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback and not getattr(c.callback, 'later', False)))}"
        )

    stub.later = True  # type: ignore[attr-defined]
    app.command(name=verb, help=f"{help_[0].upper()}{help_[1:]} (not built yet).", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
        stub
    )


for _verb, _help in _LATER.items():
    _later(_verb, _help)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _table(rows: list[dict[str, Any]]) -> None:
    from .report.text import results

    _console().print(results(rows))


def main() -> None:
    """Entry point: a mistake in the input is one line on standard error and exit code 2."""
    try:
        app()
    except QSearchError as error:
        typer.echo(f"qsearch: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
