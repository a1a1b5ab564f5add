"""The OCP block formats, `mxfp4`, `mxfp6` and `mxfp8`: blocks of 32 small floats that share a power
of two.

OCP Microscaling Formats v1.0, section 6.3: the power of two puts the largest weight into the
largest binade of the element; what lies beyond the largest value is clipped. Of the two 6-bit and
the two 8-bit elements those with more mantissa, for weights and inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.format_words import groups_of
from ...core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..codes import Codes
    from ..packed_weight import AbstractPackedWeight

family = "block"
words = ("mxfp4", "mxfp6", "mxfp8")
inputs = {word: word for word in words}
sizes = ""
multiplied_as = "float"
stores_zero = False
follows_range = True
has_grid = False
ELEMENTS = {"mxfp4": "e2m1", "mxfp6": "e2m3", "mxfp8": "e4m3"}
_BLOCK, _SCALE_BITS = 32, 8


def bits(word: str) -> int:
    """The number in the word."""
    return int(word.removeprefix("mxfp"))


def group(word: str) -> int:
    """A block."""
    return _BLOCK


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, and an exponent a block."""
    return bits(word) * rows * columns + groups_of(rows, columns, group) * _SCALE_BITS


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 blocks [rows, blocks, 32]."""
    import torch

    scale = _scale(groups.abs().amax(-1, keepdim=True), scheme.format)
    return quantize_to_grid(groups, scale, torch.zeros_like(scale), scheme.format)


def qparams_from_range(low: Tensor, high: Tensor, word: str) -> tuple[Tensor, Tensor]:
    """The power of two of each block of an input, from its ends; zero is 0."""
    import torch

    scale = _scale(torch.maximum(low.abs(), high.abs()), word)
    return scale, torch.zeros_like(scale)


def _scale(size: Tensor, word: str) -> Tensor:
    """The power of two that puts the largest magnitude into the largest binade of the element."""
    import torch

    from ..floats import FloatFormat

    highest = FloatFormat.named(ELEMENTS[word]).highest
    exponent = torch.frexp(size).exponent - 1 - highest  # floor(log2) is exact this way
    exponent = torch.where(size > 0, exponent, -127).clamp(-127, 127)
    return torch.exp2(exponent.double()).float()


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, word: str) -> Tensor:
    """What `quantize_to_grid` makes of `x`, in floating point."""
    return quantize_to_grid(x, scale, zero, word).values()


def quantize_to_grid(
    groups: Tensor, scale: Tensor, zero: Tensor, word: str, unit: float = 1.0
) -> Codes:
    """Each number to its nearest code."""
    from ..codes import element_codes

    return element_codes(groups, scale, ELEMENTS[word], unit)


def level_table(word: str, device: torch.device | str) -> Tensor:
    """fp32 [2^bits]: what each code stands for before its scale."""
    from ..floats import FloatFormat

    return FloatFormat.named(ELEMENTS[word]).values(device)


def element(word: str) -> str:
    """The float format that a code spells."""
    return ELEMENTS[word]


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Codes, and exponents as bytes."""
    from ..packed_weight import Layout, PackedWeight

    return PackedWeight(
        scheme,
        rows,
        columns,
        device,
        Layout(scale="float8_e8m0fnu", table=level_table(scheme.format, "cpu")),
    )
