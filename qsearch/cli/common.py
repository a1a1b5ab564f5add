"""What all commands share: the app, the terminal, a run folder whose config a command changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import QSearchError

if TYPE_CHECKING:
    from ..job import Run

app = typer.Typer(
    name="qsearch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which layers of a diffusion model stand few bits, why, and what to do.",
)
Folder = Annotated[
    Path,
    typer.Argument(
        help="run folder, made by `qsearch extract` or `qsearch run`", show_default=False
    ),
]


class Terminal:
    """Progress on the terminal: lines, and bars with the time left; plain lines where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def say(self, line: str) -> None:
        """A line on standard error."""
        self.console.print(line, markup=False, highlight=False)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; the context gives the function that advances it."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda n: bars.advance(task, n)


@contextmanager
def changed_run(folder: Path, **changes: dict[str, Any] | str | None) -> Iterator[Run]:
    """The run in `folder` with the given keys of its config changed; saved so when the work on it is done."""
    from .. import config as configs
    from ..job import Run

    config = configs.load(folder / "config.yaml")
    content = config.model_dump(mode="json") | {"folder": str(folder)}
    for name, given in changes.items():
        if isinstance(given, dict):
            content[name] = content[name] | {k: v for k, v in given.items() if v is not None}
        elif given is not None:
            content[name] = given
    changed = configs.parse(content, "the command line")
    yield Run(changed, Terminal())
    configs.save(changed, folder / "config.yaml")


def folder_for(target: str, output: Path | None = None) -> Path:
    """The run folder that `target` is, or, for a model, a run folder of its own (`output`, or runs/NAME) with a config that names it."""
    from .. import config as configs
    from ..job import Run

    if (Path(target) / "config.yaml").is_file():
        if output is not None:
            raise QSearchError(
                f"{target} is a run folder, its files stay in it; give --output with a model"
            )
        return Path(target)
    folder = output or Path("runs") / Path(target).name
    if (folder / "config.yaml").is_file():
        known = configs.load(folder / "config.yaml").model
        if known != target:
            raise QSearchError(
                f"{folder} is a run of {known}, not of {target}; give another folder with --output"
            )
        return folder
    job = Run(configs.Config(model=target, folder=folder))
    _ = job.model_folder  # a wrong name is said before anything is written
    configs.save(job.config, job.path("config.yaml"))
    return folder


def graph_and_table(job: Run) -> tuple[Any, Any]:
    """What a run folder holds from `extract` and `profile`."""
    from ..core.graph import OpGraph
    from ..core.table import SensitivityTable

    graph = OpGraph.load(job.path("graph.json"))
    return graph, SensitivityTable.load(job.path("sensitivity.parquet"), graph.id)


def console() -> Any:
    """Standard output, for tables."""
    from rich.console import Console

    return Console()


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows that compare plans, on the screen."""
    from ..report.text import results

    console().print(results(rows))
