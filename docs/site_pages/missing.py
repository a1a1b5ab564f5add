"""MissingError: what a page needs and does not find; it ends the build with its name."""

from __future__ import annotations


class MissingError(Exception):
    """A page asks for something that is not there, or that is older than what it is made from."""
