"""What all commands share: the app, the terminal, a run folder whose config a command changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.artifacts import without_secrets, write_atomic
from ..core.errors import QSearchError

if TYPE_CHECKING:
    from ..measure.executing import ExecutorOptions
    from ..stages.folder import Run

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
Storage = Annotated[
    str | None,
    typer.Option(
        help="URL of the trials, or env:NAME or file:PATH that holds it; the run's trials.db when "
        "left out",
        show_default=False,
    ),
]
Executor = Annotated[
    str | None,
    typer.Option(
        help="one of `qsearch list executors`; pool with several workers, local with one",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="of the executor; one a GPU or core of pool and ray when left out", show_default=False
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="of Ray's head: auto or HOST:PORT; a Ray on this machine alone when left out",
        show_default=False,
    ),
]
Threads = Annotated[
    int, typer.Option(help="of each worker; results are the same for one number of threads")
]
#: title of the table of products, of `bench` and `doctor`
PRODUCTS = "the product that serves each scheme here, and how many times as fast as keep it is"


class Terminal:
    """Progress on the terminal: lines, and bars with the time left; plain lines where the output is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    def say(self, line: str) -> None:
        """A line on standard error, without the passwords of URLs."""
        self.console.print(without_secrets(line), markup=False, highlight=False)

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
    """The run in `folder` with the given keys of its config changed.

    It is saved so before the work begins, and an interrupted command keeps its question; what is
    refused as a mistake leaves the config as it was.
    """
    from ..stages.config import NAME, load, parse, save
    from ..stages.folder import Run

    path = folder / NAME
    config = load(path)
    before = path.read_bytes()
    content = config.model_dump(mode="json") | {"folder": str(folder)}
    for name, given in changes.items():
        if isinstance(given, dict):
            content[name] = content[name] | {k: v for k, v in given.items() if v is not None}
        elif given is not None:
            content[name] = given
    changed = parse(content, "the command line")
    if changed != config.model_copy(update={"folder": changed.folder}):
        save(changed, path)
    try:
        yield Run(changed, Terminal())
    except QSearchError:
        if path.read_bytes() != before:
            write_atomic(path, lambda temporary: temporary.write_bytes(before))
        raise


def folder_for(target: str, output: Path | None = None) -> Path:
    """The run folder that `target` is, or a new one for a model, with a config that names it.

    `output`: where a model's folder goes; runs/NAME when left out.
    """
    from ..stages.config import NAME, Config, load, save
    from ..stages.folder import Run

    if (Path(target) / NAME).is_file():
        if output is not None:
            raise QSearchError(
                f"{target} is a run folder, its files stay in it; give --output with a model"
            )
        return Path(target)
    folder = output or Path("runs") / Path(target).name
    run = Run(Config(model=target, folder=folder))
    if (folder / NAME).is_file():
        known = load(folder).model
        if known not in (target, str(Path(target).resolve())):
            raise QSearchError(
                f"{folder} is a run of {known}, not of {target}; give another folder with --output"
            )
        return folder
    _ = run.model_folder  # a wrong name is said before anything is written
    save(run.config, run.path(NAME))
    return folder


def executor_options(
    executor: str | None, workers: int | None, address: str | None, threads: int
) -> ExecutorOptions:
    """The options of a command that parts its work. Raises `QSearchError` for what does not go together."""
    from ..core.settings import checked
    from ..measure.executing import ExecutorOptions

    content = {"executor": executor, "workers": workers, "address": address, "threads": threads}
    made = checked(ExecutorOptions, content, "the executor")
    if address is not None and made.name != "ray":
        raise QSearchError(
            f"--address is of Ray's head; given {address} with the executor {made.name}"
        )
    return made


def parted_by(
    executor: str | None, workers: int | None, address: str | None, threads: int
) -> ExecutorOptions | None:
    """`executor_options`, or None where a command is given none of them and works as ever."""
    if (executor, workers, address, threads) == (None, None, None, 1):
        return None
    return executor_options(executor, workers, address, threads)


def words(text: str | None) -> list[str] | None:
    """`a,b` as a list; None where nothing was given."""
    return None if text is None else [word for word in text.split(",") if word]


def console() -> Any:
    """Standard output, for tables."""
    from rich.console import Console

    return Console()


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows that compare plans, on the screen."""
    from ..report.text import results

    console().print(results(rows))
