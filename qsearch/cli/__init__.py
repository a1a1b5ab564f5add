"""The `qsearch` command: argv -> one verb call each; no arithmetic."""

from __future__ import annotations

import sys

import typer

from ..core.errors import QSearchError
from . import exporting, importing, learning, running, working
from .common import app

__all__ = ["app", "exporting", "importing", "learning", "main", "running", "working"]


def main() -> None:
    """Entry point: a mistake in the input is one line on standard error and exit code 2."""
    try:
        app()
    except QSearchError as error:
        typer.echo(f"qsearch: {error}", err=True)
        sys.exit(2)
