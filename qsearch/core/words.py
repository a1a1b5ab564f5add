"""What plug-ins declare of the words that a scheme may hold: read by the grammar, without importing
torch.

A transform and an activation grain each own their word: how it is spelt, what number follows it,
what is stored for it. The grammar (`core/scheme.py`) asks the plug-in itself, so that an outsider's
word is as good as one of ours. To keep parsing a scheme instant, a plug-in's module declares these
as constants and plain functions, and imports torch inside the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from . import plugins
from .errors import QSearchError, nearest

#: type of a stored tensor -> its bits
_BITS = {"uint8": 8, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}


class Stage(IntEnum):
    """Where a transform stands in a scheme: each sees what the ones before it left."""

    FIRST_TOKEN = 0
    SMOOTHING = 1
    ROTATION = 2
    LOW_RANK = 3


class Needs(IntEnum):
    """What a transform needs to know of a layer's inputs: nothing, their statistics, or these with
    second moments.
    """

    NOTHING = 0
    STATISTICS = 1
    MOMENTS = 2


@dataclass(frozen=True)
class Number:
    """The whole number in a transform's word, as in `~balance30`.

    Attributes:
        meaning: what it is, in words, for errors.
        low: the smallest.
        high: the largest.
        default: what the word means without a number; None where it must have one.
        multiple: what it must be a multiple of.
    """

    meaning: str
    low: int
    high: int
    default: int | None = None
    multiple: int = 1

    def allows(self, number: int) -> bool:
        """Whether `number` is in range and a multiple.

        Args:
            number: as a scheme gives it.

        Returns:
            Whether the word may have it.
        """
        return self.low <= number <= self.high and number % self.multiple == 0

    @property
    def rule(self) -> str:
        """The range in words."""
        step = f", a multiple of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.meaning} from {self.low} to {self.high}{step}"


@dataclass(frozen=True)
class Buffer:
    """A tensor that a packed layer stores for its input's side.

    Attributes:
        shape: its shape.
        dtype: its type by torch's name, e.g. "float16".
        typical: a value that it may well hold, for timing layers that were not calibrated.
    """

    shape: tuple[int, ...]
    dtype: str = "float16"
    typical: float = 0.0

    @property
    def bits(self) -> int:
        """Bits that it takes."""
        return math.prod(self.shape) * _BITS[self.dtype]


class TransformWord(Protocol):
    """What the grammar reads of a module in `choices/transforms/`; the whole is
    `choices.transform.AbstractTransform`.
    """

    stage: Stage
    number: Number | None
    scales_weight: bool
    unseen: str
    needs: Needs
    needs_linear: bool
    adds_bias: bool

    def stored(self, shape: Sequence[int], axis: int, number: int) -> Mapping[str, Buffer]:
        """Name -> what is stored for a layer whose weight has `shape`, with output channels on
        `axis`.

        Args:
            shape: of the layer's weight.
            axis: of its output channels.
            number: the number of the word, as the 30 of `~balance30`.

        Returns:
            What a packed layer stores for the transform; a plan is charged for it.
        """
        ...


class GrainWord(Protocol):
    """What the grammar reads of a module in `choices/activations/`; the whole is
    `choices.input_quantizer.AbstractActivation`.
    """

    word: str
    needs_inputs: bool


def grain_number(grain: str) -> Number | None:
    """The number that a grain's word takes, as the 64 of `+a4g64`; None where it takes none.

    Args:
        grain: name of the plug-in, with its number, e.g. "group64".

    Returns:
        The rule for the number, or None.
    """
    found: Number | None = getattr(grain_word(grain), "number", None)
    return found


def split_word(text: str) -> tuple[str, int | None]:
    """Name and number of a transform as a scheme spells it: `balance30` -> ("balance", 30).

    Args:
        text: as a scheme spells it.

    Returns:
        (name, number or None).
    """
    name = text.rstrip("0123456789")
    return name, int(text[len(name) :]) if len(text) > len(name) else None


def transform_word(text: str) -> TransformWord:
    """The plug-in of a transform, by its name or as a scheme spells it.

    Args:
        text: as a scheme spells it.

    Returns:
        The module.
    """
    plugin: TransformWord = plugins.load("transforms", split_word(text)[0])
    return plugin


def number_of(text: str) -> int:
    """The number of a transform as a scheme spells it, its default where it has none; 0 where it
    takes none.

    Args:
        text: as a scheme spells it.

    Returns:
        The number.
    """
    _, given = split_word(text)
    declared = transform_word(text).number
    if given is not None:
        return given
    return declared.default or 0 if declared is not None else 0


def canonical_word(text: str, rule: str, given: str) -> str:
    """A transform in the one spelling that it has.

    Args:
        text: as it was given.
        rule: the grammar of schemes, for the message.
        given: the whole scheme, for the message.

    Returns:
        The spelling by which schemes are compared.

    Raises:
        QSearchError: there is no such transform, or it does not take the number.
    """
    name, number = split_word(text)
    if name not in plugins.names("transforms", outside=False):
        known = plugins.names("transforms")
        if name not in known:
            raise QSearchError(
                f"{rule}; given {given!r} with transform {text!r}{nearest(name, known)}"
            )
    declared = transform_word(name).number
    if declared is None:
        if number is not None:
            raise QSearchError(f"~{name} takes no number; given {given!r}, write ~{name}")
        return name
    if number is None:
        if declared.default is None:
            raise QSearchError(f"~{name} takes a number, {declared.rule}; given {given!r}")
        return name
    if text != f"{name}{number}" or not declared.allows(number):
        raise QSearchError(f"~{name} takes a number, {declared.rule}; given {given!r}")
    return name if number == declared.default else text


def check_order(words: Iterable[str], given: str) -> None:
    """Refuse transforms that are not in the order of their stages.

    Args:
        words: transforms in the order in which they were given.
        given: the whole scheme, for the message.
    """
    held = list(words)
    ordered = sorted(held, key=lambda word: transform_word(word).stage)
    if held != ordered:
        raise QSearchError(
            "transforms come in the order first token, smoothing, rotation, low-rank branch; "
            f"given {given!r}, write {''.join(f'~{w}' for w in ordered)}"
        )


def grain_word(grain: str) -> GrainWord:
    """The plug-in of an activation grain, by its name.

    Args:
        grain: name of the plug-in, e.g. "tensor".

    Returns:
        The module.
    """
    plugin: GrainWord = plugins.load("activations", split_word(grain)[0])
    return plugin


def grain_of(word: str) -> str | None:
    """Name of the activation grain that a scheme spells as `word`, with its number, e.g. "t" ->
    "tensor", "g64" -> "group64"; None where there is none.

    Ours are looked at first, so that another package's plug-in is imported only for a word that
    is none of ours.

    Args:
        word: as a scheme spells it behind the bits, e.g. "t".

    Returns:
        The name with its number, or None.

    Raises:
        QSearchError: the word is a grain's, and its number is missing or out of range.
    """
    letters, number = split_word(word)
    for outside in (False, True):
        for name in plugins.names("activations", outside=outside):
            declared = grain_number(name)
            if declared is None and grain_word(name).word == word:
                return name
            if declared is not None and grain_word(name).word == letters:
                spelt = str(number) == word[len(letters) :]
                if number is None or not spelt or not declared.allows(number):
                    raise QSearchError(
                        f"{letters} behind the format of an input takes a number, {declared.rule}; "
                        f"given {word!r}"
                    )
                return f"{name}{number}"
    return None
