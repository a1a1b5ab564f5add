"""The terminal: lines and bars for people, other libraries' warnings into the run's log, and an end
within seconds where somebody presses Ctrl-C.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ..core.artifacts import without_secrets

#: a bar is shown for what takes longer than this
_WAIT = 2.0
#: after this many seconds an interrupted command that is still at work is ended
_PATIENCE = 3.5
#: what the log of a run is called
LOG = "log.txt"


class Terminal:
    """Progress on the terminal: lines, and bars with the time left; lines alone where the output is
    no terminal.

    A bar stands for what takes longer than two seconds; where nothing is counted a line with the
    time that has passed.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(file=_screen())
        # bars leave the cursor shown: a killed command could not bring it back
        self.console.show_cursor = lambda show=True: False  # type: ignore[method-assign]
        self._bars: Any = None
        self._begun: dict[Any, float] = {}
        self._lock = threading.RLock()

    def say(self, line: str) -> None:
        """A line on standard error, without the passwords of URLs."""
        self.console.print(without_secrets(line), markup=False, highlight=False)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; the context gives the function that advances it. `total` 0: only the time is told,
        while nothing else is.
        """
        if not self.console.is_terminal:
            yield lambda n: None
            return
        task = self._add(title, total)
        began, done = time.monotonic(), 0

        def advance(n: int) -> None:
            nonlocal done
            done = min(total, done + n)
            spent = time.monotonic() - began
            left = spent / done * (total - done) if done else 0.0
            with self._lock:
                if task in self._begun:
                    words = f"{_clock(spent)}, {_clock(left)} left"
                    self._bars.update(task, completed=done, left=words)
                    if done >= total:  # whatever comes next has a bar of its own
                        self._remove(task)

        try:
            yield advance
        finally:
            self._remove(task)

    def _add(self, title: str, total: int) -> Any:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        with self._lock:
            if self._bars is None:
                self._bars = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=min(40, max(8, self.console.width - 48))),
                    TaskProgressColumn(),
                    TextColumn("{task.fields[left]}"),
                    console=self.console,
                    transient=True,
                    # standard output stays a pipe's, and what libraries say the log's
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
            task = self._bars.add_task(title, total=total or None, left="", visible=False)
            self._begun[task] = time.monotonic()
            if len(self._begun) == 1:
                threading.Thread(target=self._watch, args=(self._bars,), daemon=True).start()
            return task

    def _remove(self, task: Any) -> None:
        with self._lock:
            if self._begun.pop(task, None) is None:
                return
            self._bars.remove_task(task)
            if not self._begun:
                self._bars.stop()
                self._bars = None

    def _watch(self, bars: Any) -> None:
        """Shows what has taken longer than two seconds."""
        while True:
            time.sleep(0.25)
            with self._lock:
                if self._bars is not bars:
                    return
                now = time.monotonic()
                old = {task: now - began for task, began in self._begun.items()}
                counted = [t for t in bars.tasks if t.id in old and t.total is not None]
                for t in bars.tasks:
                    if t.id not in old:
                        continue
                    shown = old[t.id] > _WAIT and (t.total is not None or not counted)
                    if t.total is None:
                        bars.update(t.id, left=_clock(old[t.id]))
                    if shown != t.visible:
                        bars.update(t.id, visible=shown)
                    if shown and not bars.live.is_started:
                        bars.start()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# --------------------------------------------------------------------------- other libraries' lines


class _Log:
    """Keeps what libraries say until it is known which run they say it of, then writes it to the
    run's log.
    """

    def __init__(self) -> None:
        self.held: list[str] = []
        self.path: Path | None = None

    def write(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.held.append(f"{stamp} {without_secrets(line)}\n")
        del self.held[:-1000]
        self.flush()

    def flush(self) -> None:
        if self.path is None or not self.held or not self.path.parent.is_dir():
            return
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.writelines(self.held)
            self.held.clear()


_log = _Log()


class _Sink(io.TextIOBase):
    """Takes the place of standard error while a command runs: what libraries write to it goes to
    the log.
    """

    encoding = "utf-8"

    def __init__(self, screen: TextIO) -> None:
        self.screen = screen
        self.rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            _log.write(line.rpartition("\r")[2])
        return len(text)

    def flush(self) -> None:
        """Nothing: whole lines are written at once."""

    def isatty(self) -> bool:
        """False, so that nobody draws bars."""
        return False

    def fileno(self) -> int:
        """That of the screen."""
        return self.screen.fileno()


def _screen() -> TextIO:
    """Standard error as people see it."""
    return sys.stderr.screen if isinstance(sys.stderr, _Sink) else sys.stderr


def say(line: str) -> None:
    """A line on standard error."""
    with suppress(OSError, ValueError):
        _screen().write(f"{line}\n")
        _screen().flush()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings and logs of libraries go to the log of the run, or nowhere where there is
    none.
    """

    def shown(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        _log.write(f"{category.__name__}: {message} ({filename}:{lineno})")

    before, screen = warnings.showwarning, sys.stderr
    warnings.showwarning = shown  # type: ignore[assignment]
    sys.stderr = _Sink(screen)
    try:
        yield
    finally:
        sys.stderr, warnings.showwarning = screen, before
        _log.path = None


def log_to(folder: Path) -> Path:
    """Other libraries' lines go to this run's log; returns its path."""
    _log.path = folder / LOG
    _log.flush()
    return _log.path


def note(line: str) -> None:
    """A line into the log alone."""
    _log.write(line)


# ------------------------------------------------------------------------------------------- Ctrl-C


class _Kept:
    """What an interrupted command says, and whom it has to stop."""

    line = "interrupted"
    said = False


def keeps(line: str) -> None:
    """What is said where the command is interrupted from here on."""
    _Kept.line, _Kept.said = line, False


def say_interrupted() -> None:
    """The line of an interrupted command, in place of its bars."""
    if _Kept.said:
        return
    _Kept.said = True
    mark = "\r" if _screen().isatty() else ""
    say(f"{mark}qsearch: {_Kept.line}")


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C ends the command in seconds, also within a library that looks at no signals.

    The first raises `KeyboardInterrupt` as ever. Where the command is still at work some seconds
    later, a thread stops the workers, says what is kept and ends the process: files are renamed
    into place when they are whole, so nothing half-written is left.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        seen = b""
        with suppress(OSError):
            while (seen := os.read(reader, 1)) and seen[0] != signal.SIGINT:
                pass
        os.close(reader)
        if seen:
            time.sleep(_PATIENCE)
            _stop_workers()
            say_interrupted()
            os._exit(130)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(before)
        os.close(writer)


def _stop_workers() -> None:
    if "qsearch.measure.workers" in sys.modules:
        sys.modules["qsearch.measure.workers"].stop()
