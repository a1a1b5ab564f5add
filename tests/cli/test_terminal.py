"""Bars on a terminal: they take neither the output of a command nor what libraries say."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from qsearch.cli import terminal


def test_while_a_bar_is_shown_output_stays_output_and_libraries_write_to_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(terminal, "_WAIT", 0.0)
    shown = terminal.Terminal()
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=60)

    with terminal.quiet(), shown.track("profile", 10) as advance:
        log = terminal.log_to(tmp_path)
        advance(1)
        limit = time.monotonic() + 20
        while "profile" not in shown.console.file.getvalue() and time.monotonic() < limit:
            time.sleep(0.05)
        print("a result")
        print("a warning of a library", file=sys.stderr)

    bar = shown.console.file.getvalue()
    assert "profile" in bar
    assert "a result" not in bar
    assert "a warning" not in bar
    assert capsys.readouterr().out == "a result\n"
    assert "a warning of a library" in log.read_text(encoding="utf-8")


class Tty(io.StringIO):
    """A terminal that remembers what it is sent."""

    def isatty(self) -> bool:
        return True


def test_bars_leave_the_cursor_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Tty()
    monkeypatch.setattr(terminal, "_WAIT", 0.0)
    monkeypatch.setattr(terminal, "_screen", lambda: sent)
    monkeypatch.setenv("TERM", "xterm-256color")

    with terminal.Terminal().track("profile", 10) as advance:
        advance(1)
        limit = time.monotonic() + 20
        while "profile" not in sent.getvalue() and time.monotonic() < limit:
            time.sleep(0.05)

    assert "profile" in sent.getvalue()
    assert "\x1b[?25l" not in sent.getvalue()  # a killed command could not show it again
