"""The `qsearch` command: argv -> one stage each; no arithmetic."""

from __future__ import annotations

import sys

import typer

from ..core.errors import QSearchError
from ..core.gates import GateFailed

# Commands are listed by --help in the order in which they are defined here.
from . import quantize, learn, deploy, inspect  # isort: skip
from .common import app

__all__ = ["app", "deploy", "inspect", "learn", "main", "quantize"]


def main() -> None:
    """Entry point: a mistake in the input is one line on standard error and exit code 2; a gate that a plan fails, 3."""
    from ..core.artifacts import without_secrets

    try:
        app()
    except GateFailed as error:
        typer.echo(f"qsearch: {without_secrets(str(error))}", err=True)
        sys.exit(3)
    except QSearchError as error:
        typer.echo(f"qsearch: {without_secrets(str(error))}", err=True)
        sys.exit(2)
