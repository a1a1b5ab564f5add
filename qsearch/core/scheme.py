"""Scheme: one way to store one layer, as a canonical string.

    keep | FORMAT [-GRANULARITY] [+aFORMAT[GRAIN]] [~TRANSFORM …] [@METHOD]

    int4-g64+a8@hqq   symmetric 4-bit integers, a scale for 64 weights of a row, 8-bit activations per token, scales chosen by HQQ
    uint3-c           asymmetric 3-bit integers (scale and zero point), one pair a channel, min-max
    e2m1-g128         floating point with 2 exponent bits and 1 mantissa bit, sign besides
    km3-c             a codebook of 8 values a channel, chosen by k-means
    mxfp4, nvfp4      the OCP and NVIDIA block formats, whose granularity is part of the format
    keep+a8           weights in full precision, activations in 8 bits
    uint4-c+a8~balance30   SmoothQuant's channel balancing with alpha = 0.30 before both are rounded
    int4-c+a8t~shift~migrate   TaQ-DiT's treatment of a post-GELU input: shift, then migration into the weight
    int8-c+a8t~bos    MixDQ's treatment of text: the first token is computed beforehand in full precision
    uint4-c+a8~balance10~steps2   ViDiT-Q's: what calibration chooses is chosen for each of two ranges of steps

Stored bits count scales, zero points and codebooks at 16 bits (as Qua2SeDiMo's released code does), block-format scales at 8, and what a
transform keeps for each channel at 16; with `~stepsN` N times what a transform keeps, and N copies of a weight that it scales. A layer that reads a concatenation (a long skip) takes a set of scales for each part of it.
Strings are keys in tables and plans; positions are never used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .errors import QSearchError, nearest

FULL_BITS = 16  # what one weight kept in full precision costs
_SIDE_BITS = 16  # a scale, a zero point or a codebook entry
#: block formats: (bits a code, block length, bits a block scale, bits a tensor scale)
_BLOCKS = {
    "mxfp4": (4, 32, 8, 0),
    "mxfp6": (6, 32, 8, 0),
    "mxfp8": (8, 32, 8, 0),
    "nvfp4": (4, 16, 8, 32),
}
_FLOATS = ("e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2")
FORMATS = (
    "keep",
    *(f"int{b}" for b in range(2, 9)),
    *(f"uint{b}" for b in range(2, 9)),
    *_FLOATS,
    *(f"km{b}" for b in range(2, 5)),
    *_BLOCKS,
)
ACTIVATIONS = ("8", "6", "4", "e4m3", "e5m2", "e3m4", "e2m3", "e3m2", "e2m1")
GRAINS = {"": "token", "t": "tensor", "c": "channel"}
#: what may happen to a layer's input before it is rounded -> whether it keeps a number for each channel of the input or of the output
TRANSFORMS = {"balance": "input", "shift": "input", "migrate": "input", "bos": "output"}
_SCALING = ("balance", "migrate")  # transforms that change what is stored of the weight
_RANGES = range(2, 10)
_SHAPE = re.compile(
    r"(?P<format>[a-z0-9]+)(-(?P<granularity>t|c|g[1-9][0-9]{0,8}))?(\+a(?P<activation>[a-z0-9]+?)(?P<grain>[tc]?))?"
    r"(?P<transforms>(~[a-z]+[0-9]{0,3})*)(@(?P<method>[a-z][a-z0-9_]*))?"
)


@dataclass(frozen=True, order=True)
class Scheme:
    """`format`: one of `FORMATS`. `group`: weights of a row that share a scale; 0 = a whole channel, -1 = the whole tensor.

    `activation`: format of the layer's input, "" = untouched; `grain`: what shares its scale (token, tensor, channel).
    `transforms`: names from `TRANSFORMS` in the order in which they are applied, with a number of hundredths where they take one.
    `method`: plug-in that chooses scales and rounding ("" = the format's default). `ranges`: how many ranges of sampler steps have transforms
    and static scales of their own. Build it with `parse`.
    """

    format: str
    group: int = 0
    activation: str = ""
    grain: str = "token"
    method: str = ""
    transforms: tuple[str, ...] = ()
    ranges: int = 1

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """Scheme from its string. Raises `QSearchError` with the grammar or the nearest name."""
        return text if isinstance(text, Scheme) else _parse(text)

    def __str__(self) -> str:
        fixed = self.format == "keep" or self.format in _BLOCKS
        granularity = "" if fixed else {-1: "-t", 0: "-c"}.get(self.group, f"-g{self.group}")
        grain = {long: short for short, long in GRAINS.items()}[self.grain]
        activation = f"+a{self.activation}{grain}" if self.activation else ""
        transforms = "".join(f"~{t}" for t in self.transforms) + (
            f"~steps{self.ranges}" if self.ranges > 1 else ""
        )
        return (
            self.format
            + granularity
            + activation
            + transforms
            + (f"@{self.method}" if self.method else "")
        )

    @property
    def family(self) -> str:
        """`keep`, `int`, `uint`, `float`, `codebook` or `block`: what kind of code it is."""
        if self.format in _BLOCKS:
            return "block"
        if self.format in _FLOATS or self.format in ACTIVATIONS:
            return "float"
        return {"km": "codebook"}.get(
            self.format.rstrip("0123456789"), self.format.rstrip("0123456789")
        )

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        if self.format == "keep":
            return FULL_BITS
        if self.format in _BLOCKS:
            return _BLOCKS[self.format][0]
        if self.family == "float":
            return 1 + int(self.format[1]) + int(self.format[3])
        return int(self.format.lstrip("kmuint"))

    @property
    def activation_bits(self) -> int:
        """Bits of one element of the layer's input; 16 where it is untouched."""
        if not self.activation:
            return FULL_BITS
        return (
            int(self.activation)
            if self.activation.isdigit()
            else 1 + int(self.activation[1]) + int(self.activation[3])
        )

    @property
    def weight_only(self) -> Scheme:
        """The same scheme without its activation part: neither the format of the input nor its transforms."""
        return Scheme(self.format, self.group, method=self.method)

    def with_input(self, other: Scheme) -> Scheme:
        """The same weights with the input treated as `other` does."""
        return replace(
            self,
            activation=other.activation,
            grain=other.grain,
            transforms=other.transforms,
            ranges=other.ranges,
        )

    def groups(self, shape: Sequence[int], axis: int = 0, splits: Sequence[int] = ()) -> int:
        """How many scales (or codebooks) a weight of `shape` has, its output channels on `axis`; an incomplete last group counts whole."""
        return sum(self._groups(part, axis) for part in parts(shape, axis, splits))

    def _groups(self, shape: Sequence[int], axis: int) -> int:
        channels = shape[axis]
        row = math.prod(shape) // max(1, channels)
        if self.format == "keep":
            return 0
        if self.group == -1:
            return 1
        return channels * (-(-row // self.group) if self.group else 1)

    def stored_bits(
        self,
        shape: Sequence[int],
        axis: int = 0,
        splits: Sequence[int] = (),
        *,
        filled: bool = False,
    ) -> int:
        """Bits that a weight of `shape` takes: codes, scales, zero points, codebooks, and what transforms keep.

        An incomplete last group has a scale like any other, and no codes but its own. Not counted: that each plane of a packed row is filled up to a byte
        (`qsearch_kernels.layout`), less than 8 bits a plane and row. `splits`: channels of each part of a concatenated input; every part has its own groups.
        `filled`: with incomplete groups of all but codebooks filled up with codes, as plans were priced at first and as their files still say.
        """
        kept = sum(
            _SIDE_BITS * (shape[axis] if TRANSFORMS[_name(t)] == "output" else shape[1 - axis])
            for t in self.transforms
        )
        copies = (
            self.ranges
            if self.format != "keep" and any(_name(t) in _SCALING for t in self.transforms)
            else 1
        )
        return self.ranges * kept + copies * sum(
            self._stored(part, axis, filled) for part in parts(shape, axis, splits)
        )

    def _stored(self, shape: Sequence[int], axis: int, filled: bool) -> int:
        weights = math.prod(shape)
        if self.format == "keep":
            return FULL_BITS * weights
        groups = self._groups(shape, axis)
        codes = self.bits * weights
        if self.family == "codebook":
            return codes + groups * (_SIDE_BITS << self.bits)
        if filled and self.group > 0:
            codes = self.bits * groups * self.group
        if self.format in _BLOCKS:
            _, _, scale, tensor = _BLOCKS[self.format]
            return codes + groups * scale + tensor
        return codes + groups * _SIDE_BITS * (2 if self.family == "uint" else 1)


def input_part(text: str) -> Scheme:
    """What `+aBITS[~TRANSFORM]` (or nothing) adds to any scheme. Raises `QSearchError` where it is something else."""
    found = (
        _parse("int8-c" + text) if isinstance(text, str) and (not text or text[0] in "+~") else None
    )
    if found is None or found.method:
        raise QSearchError(
            f"an input is treated by +aBITS[~TRANSFORM], e.g. +a8t~bos, or by nothing; given {text!r}"
        )
    return found


def parts(shape: Sequence[int], axis: int, splits: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the parts into which `splits` cuts a weight along its input channels; the weight itself where it is not cut."""
    if not splits:
        return [tuple(shape)]
    return [tuple(part if i == 1 - axis else n for i, n in enumerate(shape)) for part in splits]


def _name(transform: str) -> str:
    return transform.rstrip("0123456789")


@lru_cache(maxsize=4096)
def _parse(text: str) -> Scheme:
    rule = (
        "a scheme is FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD] or keep, e.g. int4-g64+a8@hqq"
    )
    match = _SHAPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise QSearchError(f"{rule}; given {text!r}")
    form, granularity = match["format"], match["granularity"]
    if form not in FORMATS:
        raise QSearchError(f"{rule}; given {text!r} with format {form!r}{nearest(form, FORMATS)}")
    if granularity and (form == "keep" or form in _BLOCKS):
        raise QSearchError(
            f"{form} has its granularity built in; given {text!r}, write {text.replace('-' + granularity, '')!r}"
        )
    if form == "keep" and match["method"]:
        raise QSearchError(f"keep stores the weight as it is and takes no method; given {text!r}")
    activation = match["activation"] or ""
    if activation and activation not in ACTIVATIONS:
        raise QSearchError(
            f"{rule}; given {text!r} with activation {activation!r}{nearest(activation, ACTIVATIONS)}"
        )
    words = match["transforms"].split("~")[1:]
    transforms, ranges = tuple(w for w in words if _name(w) != "steps"), _ranges(words, text)
    for transform in transforms:
        if _name(transform) not in TRANSFORMS:
            raise QSearchError(
                f"{rule}; given {text!r} with transform {transform!r}{nearest(_name(transform), TRANSFORMS)}"
            )
        number = transform.removeprefix(_name(transform))
        if number and (
            _name(transform) != "balance" or number != str(int(number)) or int(number) > 100
        ):
            raise QSearchError(
                f"balance alone takes a number, its alpha in hundredths from 0 to 100; given {text!r}"
            )
    transforms = tuple(
        "balance" if t == "balance50" else t for t in transforms
    )  # one string for one meaning
    if transforms and form == "keep" and not activation:
        raise QSearchError(
            f"a transform prepares what is rounded, and {text!r} rounds nothing; write 'keep'"
        )
    if ranges > 1 and not transforms and (not activation or not match["grain"]):
        raise QSearchError(
            f"~steps is for what calibration chooses, transforms and static scales of inputs; {text!r} has neither"
        )
    if form in _BLOCKS:
        group = _BLOCKS[form][1]
    elif granularity is None or granularity == "c":
        group = 0
    else:
        group = -1 if granularity == "t" else int(granularity[1:])
    return Scheme(
        form,
        group,
        activation,
        GRAINS[match["grain"] or ""],
        match["method"] or "",
        transforms,
        ranges,
    )


def _ranges(words: Sequence[str], text: str) -> int:
    """How many ranges of steps `~stepsN` asks for; 1 where it is not there."""
    found = [w for w in words if _name(w) == "steps"]
    if len(found) > 1 or any(w not in {f"steps{n}" for n in _RANGES} for w in found):
        raise QSearchError(
            f"~steps takes a number of ranges from {_RANGES[0]} to {_RANGES[-1]}, and stands once; given {text!r}"
        )
    return int(found[0].removeprefix("steps")) if found else 1


KEEP = Scheme("keep")
