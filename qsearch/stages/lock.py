"""Lock: one command at a time writes into a run's folder, so that two do not write over each
other's files; those that add measured plans to one study are many on purpose.

The operating system holds it (flock) and lets go when its process ends, however that ends. Where
a file system has no locks, or the folder can't be written, there is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import QSearchError

NAME = ".lock"


@contextmanager
def locked(folder: Path, verb: str, *, together: bool = False) -> Iterator[None]:
    """Inside, this command has the run's folder.

    Args:
        folder: the run's.
        verb: the command, for the error of another.
        together: share it with others that say so, too.

    Raises:
        QSearchError: another command has it; with its process id.
    """
    file = _opened(folder)
    if file is None:
        yield
        return
    try:
        taken = _taken(file, together=together)
        while taken and _gone(file) and (again := _opened(folder)) is not None:
            os.close(file)
            file = again
            taken = _taken(file, together=together)
        if not taken:
            other = os.pread(file, 200, 0).decode(errors="replace").strip()
            raise QSearchError(
                f"one command at a time writes into a run's folder, and {folder} has one: "
                f"{other or 'another'}; wait until it has finished, or give another folder"
            )
        with suppress(OSError):  # a full disk: the verb says so
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} (qsearch {verb})".encode(), 0)
        try:
            yield
        finally:
            if not together:
                with suppress(OSError):
                    (folder / NAME).unlink()
    finally:
        os.close(file)


def _opened(folder: Path) -> int | None:
    try:
        return os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None


def _gone(file: int) -> bool:
    """Whether the command before removed the file between its opening here and its lock."""
    return os.fstat(file).st_nlink == 0


def _taken(file: int, *, together: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if together else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
