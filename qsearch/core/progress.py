"""Progress: how work that takes long speaks: lines for people, and loops that are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """`say` a line, `track` a loop (the context gives a function that advances it)."""

    def say(self, line: str) -> None: ...  # noqa: D102 (the class says it)

    def track(  # noqa: D102
        self, title: str, total: int
    ) -> AbstractContextManager[Callable[[int], None]]: ...


class Silent:
    """A `Progress` that says nothing; the default from Python."""

    def say(self, line: str) -> None:
        """Nothing."""

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Nothing."""
        yield lambda n: None
