"""All commands in the order of work, and how a command ends: its exit code, and the one line of a
mistake.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated

import typer

from ..core.errors import QSearchError
from ..core.gates import GateFailed
from . import deploy, inspect, learn, quantize, start
from .common import app
from .examples import EXAMPLES
from .terminal import interruptible, quiet, say, say_interrupted

__all__ = ["app", "deploy", "inspect", "learn", "main", "quantize", "start"]

_ORDER = list(EXAMPLES)
for _command in app.registered_commands:  # listed in the order of work, with examples at the end
    _name = str(_command.name or getattr(_command.callback, "__name__", ""))
    _command.name = _name
    _command.epilog = "\n\n".join(f"$ {example}" for example in EXAMPLES[_name])
app.registered_commands.sort(
    key=lambda c: _ORDER.index(c.name) if c.name in _ORDER else len(_ORDER)
)


_INTERRUPTED = 130
_DEBUG = "--debug"


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"qsearch {__version__}")
        raise typer.Exit


@app.callback(epilog="\n\n".join(f"$ {example}" for example in EXAMPLES[""]))
def _whole(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="say the version and end"
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="with an error, show where in the code it was raised")
    ] = False,
) -> None:
    """Mixed-precision quantization of diffusion models: which layers need many bits, and why."""


def _show(error: Exception, debug: bool) -> None:
    """Where an error was raised, with `--debug`; without the passwords of URLs."""
    from ..core.artifacts import without_secrets

    if debug:
        for part in traceback.format_exception(error):
            sys.stderr.write(without_secrets(part))


def main() -> None:
    """The command of `sys.argv`: a mistake in the input is one line on standard error and exit code
    2; a gate that a plan fails, 3; Ctrl-C, 130. `--debug`, anywhere in the command, shows the
    traceback before that line.
    """
    from ..core.artifacts import without_secrets

    debug = _DEBUG in sys.argv[1:]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word != _DEBUG)]

    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign gets another one
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with quiet(), interruptible():
            code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer's word for Ctrl-C
            say_interrupted()
        sys.exit(code if isinstance(code, int) else 0)
    except GateFailed as error:
        _show(error, debug)
        say(f"qsearch: {without_secrets(str(error))}")
        sys.exit(3)
    except QSearchError as error:
        _show(error, debug)
        say(f"qsearch: {without_secrets(str(error))}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        say_interrupted()
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # `qsearch list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except Exception as error:
        shown = getattr(error, "show", None)
        if shown is None:
            raise
        shown()  # a mistake in the options, which click words
        sys.exit(getattr(error, "exit_code", 2))
