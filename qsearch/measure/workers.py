"""Workers: processes that end with the one that started them, leave Ctrl-C to it, and write other
libraries' lines where it says.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path

#: seconds between two looks at whether the parent still lives
_LOOK = 1.0


class _Log:
    """Where workers write what other libraries say; nowhere when None."""

    path: Path | None = None


def log_to(path: Path | None) -> None:
    """Workers that are started from here on write other libraries' lines to this file."""
    _Log.path = path


@contextmanager
def starting() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C, also while they import, and their standard
    error is the log.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept, opened = -1, -1
    with suppress(OSError):
        sys.stderr.flush()
        opened = os.open(_Log.path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        kept = os.dup(2)
        os.dup2(opened, 2)
    try:
        yield
    finally:
        if kept >= 0:
            os.dup2(kept, 2)
            os.close(kept)
        if opened >= 0:
            os.close(opened)
        signal.signal(signal.SIGINT, before)


def follow_parent(parent: int) -> None:
    """Ends this process when the one that started it has ended, however that came.

    Args:
        parent: id of the process that started it, told by itself: it may have ended before this
            one looks for the first time.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def stop() -> None:
    """End the processes that this one has started through `multiprocessing`, at once."""
    for child in active_children():
        with suppress(OSError, ValueError):
            child.kill()
