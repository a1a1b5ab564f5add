"""Executing: parts of a work that do not depend on each other, done by whoever there is.

A task is what every worker begins with (a model that is loaded once) and what it then does with one
part after another. Executors differ in where workers live; results do not: a worker computes with a
number of threads that does not depend on how many workers there are, since sums over threads round
differently.
"""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import Field

from ..core import plugins
from ..core.allocator import keep_freed_buffers
from ..core.artifacts import versions
from ..core.errors import QSearchError
from ..core.settings import Settings

#: part -> result
Do = Callable[[Any], Any]
Say = Callable[[str], None]
#: what of `versions()` must be the same everywhere for results to be
_SAME = ("qsearch-diffusion", "torch", "diffusers", "transformers")


class ExecutorOptions(Settings):
    """Who works, and how many."""

    executor: str | None = Field(
        None,
        description="plug-in of `qsearch list executors`; pool with several workers, else local",
    )
    workers: int | None = Field(
        None, ge=1, description="one for local, else one a GPU or core when left out"
    )
    address: str | None = Field(
        None, description="of Ray's head: auto or HOST:PORT; a Ray of its own here when left out"
    )
    threads: int = Field(1, ge=1, description="of each worker; other numbers round differently")

    @property
    def name(self) -> str:
        """The executor's name. Raises `QSearchError` for one that is not there."""
        asked = self.executor or ("pool" if (self.workers or 1) > 1 else "local")
        return plugins.check("executors", asked)


@dataclass(frozen=True)
class Task:
    """Work that falls into parts.

    Attributes:
        begin: called once in every worker with its torch device; gives what is done with a part.
            It travels to other processes, as do parts and results.
        device: torch device of the workers; of several GPUs each worker has one.
        versions: of the process that asks; workers with others are refused.
    """

    begin: Callable[[str], Do]
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=versions)


class AbstractExecutor(Protocol):
    """What a module in `executors/` provides."""

    def execute(
        self, task: Task, parts: deque[Any], options: ExecutorOptions, say: Say
    ) -> Iterator[tuple[Any, Any]]:
        """(part, result) of every part, as they are finished, in any order.

        `parts` may grow while results are taken: a part is handed out when a worker is free.

        Args:
            task: what workers do.
            parts: what is to be done; empty at the end.
            options: how many workers, with how many threads, where.
            say: called with which workers are left out, and why.

        Returns:
            An iterator; whoever stops early stops the workers.

        Raises:
            QSearchError: the first mistake in the input that a worker finds.
            WorkerLost: no worker is left.
        """
        ...


class WorkerLost(QSearchError):
    """Workers were killed, or went away, and nobody is left to do the rest."""


@dataclass(frozen=True)
class Attempt:
    """What came of one part: a value, or a mistake in the input, in words."""

    value: Any = None
    mistake: str | None = None

    def result(self) -> Any:
        """The value. Raises `QSearchError` where it was a mistake."""
        if self.mistake is not None:
            raise QSearchError(self.mistake)
        return self.value


def attempt(call: Callable[[], Any]) -> Attempt:
    """`call()`, a `QSearchError` as words: exceptions change on their way between processes."""
    try:
        return Attempt(call())
    except QSearchError as error:
        return Attempt(mistake=str(error))


def execute(
    task: Task, parts: deque[Any], options: ExecutorOptions | None = None, say: Say | None = None
) -> Iterator[tuple[Any, Any]]:
    """Do the parts of a task by the executor that the options name; as
    `AbstractExecutor.execute`.
    """
    asked = options or ExecutorOptions()
    plugin: AbstractExecutor = plugins.load("executors", asked.name)
    if parts:
        yield from plugin.execute(task, parts, asked, say or (lambda line: None))


def begun(task: Task, device: str, threads: int) -> Do:
    """Begin a task in a worker's own process, for good.

    Raises:
        QSearchError: this worker has other versions, or not what the task begins with.
    """
    import torch

    check_versions(task.versions)
    keep_freed_buffers()
    torch.set_num_threads(threads)
    return task.begin(device)


def check_versions(wanted: dict[str, str]) -> None:
    """Raise `QSearchError` where this process has other versions than the one that asks."""
    here = versions()
    for name in _SAME:
        if here.get(name) != wanted.get(name):
            raise QSearchError(
                f"workers need the versions of the process that asks; {platform.node()} has {name} "
                f"{here.get(name, 'not at all')}, there it is {wanted.get(name, 'not there')}"
            )


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def workers_here(task: Task, options: ExecutorOptions, parts: int) -> int:
    """How many workers this machine gets: as asked, else one a GPU, or a core for each thread."""
    import torch

    if options.workers is not None:
        return min(options.workers, parts)
    if task.device.startswith("cuda"):
        found = torch.cuda.device_count()
    else:
        found = (os.cpu_count() or 1) // options.threads
    return max(1, min(found, parts))
