"""What plug-ins declare of the formats that a weight or an input may be stored in: read by the
grammar, without importing torch.

A module in `choices/formats/` owns its words: how they are spelt, how many bits a code takes, what
is stored beside the codes. The grammar (`core/scheme.py`) and the cost of a plan ask the module
itself, so that an outsider's format is as good as one of ours. To keep parsing a scheme instant, a
module declares these as constants and plain functions, and imports torch inside the functions that
need it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from typing import Any, Protocol

from . import plugins
from .errors import QSearchError

#: bits of a scale, a zero point or a codebook entry
SIDE_BITS = 16


class FormatWord(Protocol):
    """What the grammar reads of a module in `choices/formats/`; the whole is
    `choices.format.AbstractFormat`.

    Attributes:
        family: the kind of code that its formats share, one word for tables and features.
        words: every spelling, as "int4".
        inputs: what stands behind `+a` for the grid of one of its formats -> that format, as "8" ->
            "uint8".
        sizes: letters of "tcg" (tensor, channel, group) that may follow a word; "" where the group
            is built in.
        multiplied_as: arithmetic that multiplies its codes with inputs rounded to that kind: "int",
            "float", or "" for none.
    """

    family: str
    words: Sequence[str]
    inputs: Mapping[str, str]
    sizes: str
    multiplied_as: str

    def bits(self, word: str) -> int:
        """Bits of one code, without scales."""
        ...

    def group(self, word: str) -> int:
        """Weights that share a scale where a scheme does not say it: 0 for a channel, or the
        built-in size.
        """
        ...

    def stored_bits(self, word: str, rows: int, columns: int, group: int) -> int:
        """Bits of a weight [rows, columns]: codes, and everything that is stored beside them."""
        ...


def groups_of(rows: int, columns: int, group: int) -> int:
    """How many groups a weight has; an incomplete last one of a row counts whole.

    Args:
        rows: channels of the output.
        columns: weights of a row.
        group: weights of a group; 0: a row, -1: the whole weight.
    """
    if group == -1:
        return 1
    return rows * (-(-columns // group) if group else 1)


def format_word(text: str) -> FormatWord | None:
    """The plug-in that spells the format `text`, of weights or of inputs; None where there is
    none.
    """
    return _formats(text, tuple(sys.path), metadata.entry_points)


def input_format(text: str) -> str | None:
    """The format whose grid an input has behind `+a`, e.g. "8" -> "uint8"; None where there is
    none.
    """
    return _inputs(text, tuple(sys.path), metadata.entry_points)


def formats() -> list[str]:
    """Every format of a weight, `keep` first; outsiders' last."""
    return ["keep", *_words(tuple(sys.path), metadata.entry_points)[0]]


def input_formats(*, outside: bool = True) -> list[str]:
    """Every format of an input; outsiders' last, or left out."""
    if outside:
        return list(_words(tuple(sys.path), metadata.entry_points)[1])
    return [word for module in _ours() for word in module.inputs]


def families() -> tuple[str, ...]:
    """Every kind of code, without importing what another package installed."""
    return _families(tuple(sys.path), metadata.entry_points)


def _modules() -> Iterator[FormatWord]:
    """The modules, ours first, so that what another package installed is imported only for a word
    that is none of ours.
    """
    yield from _ours()
    ours = plugins.names("formats", outside=False)
    for name in plugins.names("formats"):
        if name not in ours:
            with suppress(
                QSearchError
            ):  # who asks for a word that nobody has is told: `unreadable`
                yield plugins.load("formats", name)


def unreadable() -> str:
    """What to add to an error about an unknown word: which installed formats can't be imported, or
    nothing.
    """
    for name in plugins.names("formats"):
        try:
            plugins.load("formats", name)
        except QSearchError as error:
            return f"; {error}"
    return ""


@lru_cache(maxsize=1)
def _ours() -> tuple[FormatWord, ...]:
    return tuple(plugins.load("formats", n) for n in plugins.names("formats", outside=False))


# What is found is remembered as long as the path and what reads it are the same: reading entry
# points takes tens of ms.


@lru_cache(maxsize=8)
def _words(path: tuple[str, ...], entry_points: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    modules = list(_modules())
    return (
        tuple(word for module in modules for word in module.words),
        tuple(word for module in modules for word in module.inputs),
    )


@lru_cache(maxsize=256)
def _formats(text: str, path: tuple[str, ...], entry_points: Any) -> FormatWord | None:
    for module in _modules():
        if text in module.words or text in module.inputs.values():
            return module
    return None


@lru_cache(maxsize=256)
def _inputs(text: str, path: tuple[str, ...], entry_points: Any) -> str | None:
    return next((m.inputs[text] for m in _modules() if text in m.inputs), None)


@lru_cache(maxsize=8)
def _families(path: tuple[str, ...], entry_points: Any) -> tuple[str, ...]:
    found = [plugins.constants("formats", n, ["family"]) for n in plugins.names("formats")]
    return tuple(sorted({held["family"] for held in found if "family" in held}))
