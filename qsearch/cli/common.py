"""What all commands share: the app, a run folder whose settings a call may change, tables on
standard output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import QSearchError
from .options import words
from .terminal import Terminal, keeps, log_to

if TYPE_CHECKING:
    from ..measure.executing import ExecutorOptions
    from ..stages.config import Config
    from ..stages.folder import Run

__all__ = [
    "PRODUCTS",
    "Address",
    "Executor",
    "Folder",
    "Storage",
    "Terminal",
    "Threads",
    "Workers",
    "app",
    "asked_run",
    "console",
    "executor_options",
    "filled",
    "keeps",
    "parted_by",
    "place_for",
    "print_table",
    "words",
]

app = typer.Typer(
    name="qsearch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mixed-precision quantization of diffusion models: which layers need many bits, and why.",
)
Folder = Annotated[
    Path,
    typer.Argument(
        help="run folder, made by `qsearch run`, `extract` or `profile`", show_default=False
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


@contextmanager
def asked_run(
    place: Path | tuple[Path, Config],
    verb: str,
    changes: Mapping[str, Any] | None = None,
    *,
    together: bool = False,
) -> Iterator[Run]:
    """A run for one call of a verb.

    Options hold for this call, and are kept until it has finished: the same command goes on after
    an interruption, with or without them. Of a new run they are its config.

    Args:
        place: a run folder, or one that is to be made and the config that it begins with.
        verb: the command.
        changes: key of the config, such as `sampling.steps` -> value; None is left out.
        together: several processes may do this in one folder.

    Raises:
        QSearchError: another command is at work in the folder.
    """
    from ..stages import config as c
    from ..stages import unfinished
    from ..stages.folder import Run
    from ..stages.lock import locked

    asked = {key: value for key, value in (changes or {}).items() if value is not None}
    terminal = Terminal()
    new = isinstance(place, tuple)
    if isinstance(place, Path) and place.is_file():
        raise QSearchError(f"{place} is a file; give the run's folder, such as {place.parent}")
    folder, config = place if isinstance(place, tuple) else (place, c.load(place / c.NAME))
    if not asked and not new:
        asked = unfinished.of(folder, verb)
        if asked:
            terminal.say(
                f"{verb}: goes on as it was asked before it was interrupted: {spelt(asked)}"
            )
    changed = c.changed(config, asked, "the command line").model_copy(update={"folder": folder})
    run = Run(changed, terminal)
    if new:
        _ = run.model_folder  # a wrong name is said before anything is written
        with suppress(OSError):  # writing the config says what is wrong
            folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, verb, together=together):
        if new:
            c.save(changed, folder / c.NAME)
        yield from _asked(run, verb, asked, new=new)


def _asked(run: Run, verb: str, asked: Mapping[str, Any], *, new: bool) -> Iterator[Run]:
    from ..measure import workers
    from ..stages import unfinished

    terminal, folder = run.progress, run.folder
    assert isinstance(terminal, Terminal)
    if asked and not new:
        unfinished.remember(folder, verb, asked)
    workers.log_to(log_to(folder))
    keeps(
        f"interrupted; what was finished is kept in {folder}, and the same command goes "
        "on from there"
    )
    try:
        with terminal.track(verb, 0):
            yield run
    except QSearchError:
        unfinished.forget(folder, verb)
        raise
    unfinished.forget(folder, verb)
    if asked and not new:
        kept = " ".join(f"{key}={_value(value)}" for key, value in asked.items())
        terminal.say(
            f"{verb}: {spelt(asked)} held for this call; to keep: qsearch set {folder} {kept}"
        )


def spelt(asked: Mapping[str, Any]) -> str:
    """Settings in words: `steps 30, schemes uint4-c,uint8-c`."""
    return ", ".join(f"{key.rpartition('.')[2]} {_value(value)}" for key, value in asked.items())


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def filled(section: str, **asked: Any) -> dict[str, Any]:
    """Options of one section of the config as keys of it."""
    return {f"{section}.{name}": value for name, value in asked.items() if value is not None}


def place_for(target: str, output: Path | None = None) -> Path | tuple[Path, Config]:
    """The run folder that `target` is, or a new one for a model, with the config that names it.

    `output`: where a model's folder goes; runs/NAME when left out.
    """
    from ..stages.config import NAME, Config, load

    if (Path(target) / NAME).is_file():
        if output is not None:
            raise QSearchError(
                f"{target} is a run folder, its files stay in it; give --output with a model"
            )
        return Path(target)
    folder = output or Path("runs") / Path(target).name
    if (folder / NAME).is_file():
        known = load(folder).model
        if known not in (target, str(Path(target).resolve())):
            raise QSearchError(
                f"{folder} is a run of {known}, not of {target}; give another folder with --output"
            )
        return folder
    return folder, Config(model=target, folder=folder)


def executor_options(
    executor: str | None, workers: int | None, address: str | None, threads: int
) -> ExecutorOptions:
    """The options of a command that parts its work. Raises `QSearchError` for what does not go
    together.
    """
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


def console() -> Any:
    """Standard output, for tables."""
    from rich.console import Console

    return Console()


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows that compare plans, on the screen."""
    from ..report.text import results

    console().print(results(rows))
