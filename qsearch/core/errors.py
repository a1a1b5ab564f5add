"""Errors that teach: the rule, what was given, the nearest right thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QSearchError(Exception):
    """A mistake in the input, not in the program: the command line prints it in one line and exits
    with 2.
    """


class ArtifactError(QSearchError):
    """A file that is truncated, of another kind or version, or made for another graph."""


class InfeasibleBudget(QSearchError):
    """A budget that no combination of the allowed choices can reach."""


#: what walking through plain data raises where it is not of the shape that was expected
MISSHAPEN = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or the list of all when none is close (at
    most twelve shown).
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"; known: {shown or 'none'}"
