"""Scheme: one way to store one layer, as a canonical string.

    keep | FORMAT [-GRANULARITY] [+aFORMAT[GRAIN]] [~TRANSFORM …] [@METHOD]

    int4-g64+a8@hqq   symmetric 4-bit integers, a scale for 64 weights of a row, 8-bit inputs
                      per token, scales by HQQ
    int4-g64+aint4g64   symmetric 4-bit integers on both sides, a scale for 64 channels of a token
    nvfp4+anvfp4      NVIDIA's block format on both sides
    uint3-c           asymmetric 3-bit integers (scale and zero point), one pair a channel, min-max
    e2m1-g128         floating point with 2 exponent bits and 1 mantissa bit, sign besides
    km3-c             a codebook of 8 values a channel, chosen by k-means
    mxfp4, nvfp4      the OCP and NVIDIA block formats, whose granularity is part of the format
    keep+a8           weights in full precision, activations in 8 bits
    uint4-c+a8~balance30   SmoothQuant's channel balancing with alpha = 0.30 before both are rounded
    int4-c+a8t~bos~balance   two transforms, applied in this order
    int8-c+a8t~bos    MixDQ's text: the first token is computed beforehand in full
                      precision

The scheme of a whole attention (`core/attentions.py`) is spelt by a plug-in in
`choices/attentions/`: `window8~rettention`.

FORMAT, GRAIN and TRANSFORM are words of plug-ins (`choices/formats/`, `choices/activations/`,
`choices/transforms/`), which say themselves how they are spelt, what number they take and what they
store: see `core/format_words.py`, `core/words.py` and `core/attention_words.py`.

Stored bits count scales, zero points and codebooks at 16 bits (as Qua2SeDiMo's released code does),
block-format scales at 8, and what a transform stores. A layer that reads a concatenation (a long
skip) takes a set of scales for each part of it. Strings are keys in tables and plans; positions are
never used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .attention_words import attention_of, attention_word
from .errors import QSearchError, nearest
from .format_words import (
    FormatWord,
    format_word,
    formats,
    groups_of,
    input_format,
    input_formats,
    unreadable,
)
from .words import (
    canonical_word,
    check_order,
    grain_of,
    grain_word,
    number_of,
    split_word,
    transform_word,
)

FULL_BITS = 16  # what one weight kept in full precision costs
_STEPS = re.compile(r"~steps([0-9]*)")
_SHAPE = re.compile(
    r"(?P<format>[a-z0-9]+)(-(?P<granularity>t|c|g[1-9][0-9]{0,8}))?(\+a(?P<input>[a-z0-9_]+))?"
    r"(?P<transforms>(~[a-z][a-z_]*[0-9]{0,3})*)(@(?P<method>[a-z][a-z0-9_]*))?"
)


@dataclass(frozen=True, order=True)
class Scheme:
    """One way to store one layer and to round its input. Build it with `parse`.

    Attributes:
        format: `keep`, or a word of a plug-in in `choices/formats/`.
        group: weights of a row that share a scale; 0 = a whole channel, -1 = the whole tensor.
        activation: format of the layer's input, "" = untouched.
        grain: plug-in that says what shares a scale of the input (token, tensor, channel, group),
            with a number where it has one: `group64`.
        method: plug-in that chooses scales and rounding; "" = the format's default.
        transforms: words of plug-ins in the order in which they are applied, with a number where
            they have one.
        attention: what is done to a whole attention, in a plug-in's words; "" at layers, and where
            it is dense.
    """

    format: str
    group: int = 0
    activation: str = ""
    grain: str = "token"
    method: str = ""
    transforms: tuple[str, ...] = ()
    attention: str = ""

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """Scheme from its string.

        Args:
            text: as `int4-g64+a8@hqq`; a scheme is given back as it is.

        Returns:
            The scheme; `parse(str(scheme)) == scheme`.

        Raises:
            QSearchError: it is none; the message says the grammar or the nearest name.
        """
        return text if isinstance(text, Scheme) else _parse(text)

    def __str__(self) -> str:
        if self.attention:
            return self.attention
        fixed = self.format == "keep" or not self._word.sizes
        granularity = "" if fixed else {-1: "-t", 0: "-c"}.get(self.group, f"-g{self.group}")
        block = bool(self.activation) and _block_size(self.activation)
        grain = "" if block else _spelt(self.grain)
        activation = f"+a{self.activation}{grain}" if self.activation else ""
        transforms = "".join(f"~{t}" for t in self.transforms)
        return (
            self.format
            + granularity
            + activation
            + transforms
            + (f"@{self.method}" if self.method else "")
        )

    @property
    def _word(self) -> FormatWord:
        """The plug-in of the format; never asked for `keep`."""
        found = format_word(self.format)
        if found is None:
            raise QSearchError(
                f"there is no format {self.format!r}{nearest(self.format, formats())}"
            )
        return found

    @property
    def family(self) -> str:
        """What kind of code it is, as the format's plug-in says: `keep`, `int`, `uint`, `float`,
        `codebook`, `block` or another.
        """
        return "keep" if self.format == "keep" else self._word.family

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        return FULL_BITS if self.format == "keep" else self._word.bits(self.format)

    @property
    def multiplied_as(self) -> str:
        """Arithmetic that multiplies the weight's codes with rounded inputs: `int`, `float`, or ""
        for none.
        """
        return "" if self.format == "keep" else self._word.multiplied_as

    @property
    def activation_format(self) -> Scheme:
        """The scheme of a weight that has the grid of the input's format."""
        word = input_format(self.activation)
        if word is None:
            raise QSearchError(
                f"no format {self.activation!r} of "
                f"inputs{nearest(self.activation, input_formats())}"
            )
        return Scheme(word)

    @property
    def activation_bits(self) -> int:
        """Bits of one element of the layer's input; 16 where it is untouched."""
        return self.activation_format.bits if self.activation else FULL_BITS

    @property
    def integer_input(self) -> bool:
        """Whether the input is rounded to integers."""
        return bool(self.activation) and self.activation_format.multiplied_as == "int"

    @property
    def scales_weight(self) -> bool:
        """Whether a transform changes what is stored of the weight."""
        return self.format != "keep" and any(
            transform_word(t).scales_weight for t in self.transforms
        )

    @property
    def static_input(self) -> bool:
        """Whether the input is rounded on a range that calibration chose."""
        return bool(self.activation) and grain_word(self.grain).needs_inputs

    @property
    def fitted_by_range(self) -> bool:
        """Whether calibration chooses something besides the weight, or something is carried from
        step to step.
        """
        if self.attention:
            return self.carried
        return any(transform_word(t).needs for t in self.transforms) or self.static_input

    @property
    def carried(self) -> bool:
        """Whether an attention carries something from one step to the next."""
        return bool(self.attention) and attention_word(self.attention).every(self.attention) > 0

    @property
    def weight_only(self) -> Scheme:
        """The same scheme without what it does to the input."""
        return Scheme(self.format, self.group, method=self.method)

    def with_input(self, other: Scheme) -> Scheme:
        """The same weights with the input rounded and transformed as in `other`.

        Args:
            other: whose activation format, grain and transforms are taken.

        Returns:
            A scheme with both.
        """
        return replace(
            self,
            activation=other.activation,
            grain=other.grain,
            transforms=other.transforms,
        )

    def groups(self, shape: Sequence[int], axis: int = 0, splits: Sequence[int] = ()) -> int:
        """How many scales (or codebooks) a weight of `shape` has, its output channels on `axis`; an
        incomplete last group counts whole.

        Args:
            shape: of the weight.
            axis: of its output channels.
            splits: channels of each part of a concatenated input; every part has its own groups.

        Returns:
            Their number.
        """
        return sum(self._groups(part, axis) for part in parts(shape, axis, splits))

    def _groups(self, shape: Sequence[int], axis: int) -> int:
        if self.format == "keep":
            return 0
        rows = shape[axis]
        return groups_of(rows, math.prod(shape) // max(1, rows), self.group)

    def stored_bits(
        self,
        shape: Sequence[int],
        axis: int = 0,
        splits: Sequence[int] = (),
        *,
        filled: bool = False,
    ) -> int:
        """Bits that a weight of `shape` takes: codes, scales, zero points, codebooks, and what
        transforms store.

        An incomplete last group has a scale like any other, and no codes but its own. Not counted:
        that each plane of a packed row is filled up to a byte (`qsearch_kernels.layout`), less than
        8 bits a plane and row.

        Args:
            shape: of the weight.
            axis: of its output channels.
            splits: channels of each part of a concatenated input; every part has its own groups.
            filled: count incomplete groups of all but codebooks as filled up with codes, as the
                first plan files did.

        Returns:
            Bits, side information included.
        """
        kept = sum(
            buffer.bits
            for word in self.transforms
            for buffer in transform_word(word).stored(shape, axis, number_of(word)).values()
        )
        return kept + sum(self._stored(part, axis, filled) for part in parts(shape, axis, splits))

    def _stored(self, shape: Sequence[int], axis: int, filled: bool) -> int:
        weights = math.prod(shape)
        if self.format == "keep":
            return FULL_BITS * weights
        rows = shape[axis]
        columns = weights // max(1, rows)
        stored = self._word.stored_bits(self.format, rows, columns, self.group)
        if filled and self.group > 0 and self.family != "codebook":
            stored += self.bits * (groups_of(rows, columns, self.group) * self.group - weights)
        return stored


def input_part(text: str) -> Scheme:
    """What `+aBITS[~TRANSFORM]` (or nothing) adds to any scheme. Raises `QSearchError` where it is
    something else.
    """
    found = (
        _parse("int8-c" + text) if isinstance(text, str) and (not text or text[0] in "+~") else None
    )
    if found is None or found.method:
        raise QSearchError(
            "an input is rounded by +aBITS[~TRANSFORM], e.g. +a8t~bos, or by nothing; "
            f"given {text!r}"
        )
    return found


def parts(shape: Sequence[int], axis: int, splits: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the parts into which `splits` cuts a weight along its input channels; the weight
    itself where it is not cut.
    """
    if not splits:
        return [tuple(shape)]
    return [tuple(part if i == 1 - axis else n for i, n in enumerate(shape)) for part in splits]


@lru_cache(maxsize=64)
def _spelt(grain: str) -> str:
    return f"{grain_word(grain).word}{split_word(grain)[1] or ''}"


@lru_cache(maxsize=4096)
def _parse(text: str) -> Scheme:
    rule = (
        "a scheme is FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD] or keep, e.g. int4-g64+a8@hqq"
    )
    if isinstance(text, str) and (attention := attention_of(text)) is not None:
        return Scheme("keep", attention=attention)
    match = _SHAPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise QSearchError(f"{rule}; given {text!r}")
    form, granularity = match["format"], match["granularity"]
    word = format_word(form) if form != "keep" else None
    if form != "keep" and (word is None or form not in word.words):
        raise QSearchError(
            f"{rule}; given {text!r} with format {form!r}{nearest(form, formats())}{unreadable()}"
        )
    sizes = "" if word is None else word.sizes
    if granularity and not sizes:
        raise QSearchError(
            f"{form} has its granularity built in; given {text!r}, write "
            f"{text.replace('-' + granularity, '')!r}"
        )
    if granularity and granularity[0] not in sizes:
        raise QSearchError(
            f"{form} takes {', '.join('-' + s + 'N' * (s == 'g') for s in sizes)}; given {text!r}, "
            f"write {text.replace('-' + granularity, '-' + sizes[0], 1)!r}"
        )
    if form == "keep" and match["method"]:
        raise QSearchError(f"keep stores the weight as it is and takes no method; given {text!r}")
    activation, grain = _input(match["input"] or "", rule, text)
    if _STEPS.search(match["transforms"]):
        raise QSearchError(
            "ranges of sampler steps belong to the plan and not to a scheme: leave "
            f"~steps out of {text!r} and set "
            "`steps` under `allocate` (plans with ~steps that were saved before are "
            "converted when they are loaded)"
        )
    words = match["transforms"].split("~")[1:]
    transforms = tuple(canonical_word(word, rule, text) for word in words)
    check_order(transforms, text)
    if transforms and form == "keep" and not activation:
        raise QSearchError(
            f"a transform prepares what is rounded, and {text!r} rounds nothing; write 'keep'"
        )
    if granularity is None:
        group = 0 if word is None else word.group(form)
    else:
        group = {"t": -1, "c": 0}[granularity] if granularity in "tc" else int(granularity[1:])
    return Scheme(form, group, activation, grain, match["method"] or "", transforms)


def _input(text: str, rule: str, given: str) -> tuple[str, str]:
    """Format and grain of what stands behind `+a`; the grain's word may have several letters."""
    if not text:
        return "", "token"
    for outside in (False, True):  # what another package installed is imported for its words alone
        forms = input_formats(outside=outside)
        for form in sorted(forms, key=len, reverse=True):
            if text.startswith(form) and (grain := grain_of(text.removeprefix(form))) is not None:
                return form, _block(form, grain, given)
    raise QSearchError(
        f"{rule}; given {given!r} with activation {text!r}{nearest(text, forms)}{unreadable()}"
    )


def _block(form: str, grain: str, given: str) -> str:
    """The grain of an input's format: that of its blocks, where the format has some."""
    size = _block_size(form)
    if size and grain != "token":
        raise QSearchError(
            f"inputs in {form} have a scale for {size} channels, built in; given {given!r}, write "
            f"+a{form}"
        )
    return f"group{size}" if size else grain


@lru_cache(maxsize=64)
def _block_size(form: str) -> int:
    """Channels that share a scale in an input's format; 0 where its grain says so."""
    word = input_format(form)
    found = None if word is None else format_word(word)
    return found.group(str(word)) if found is not None and not found.sizes else 0


KEEP = Scheme("keep")
