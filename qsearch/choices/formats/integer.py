"""Symmetric integers, `int2` to `int8`: one scale, and zero in the middle of the codes; the grid of
inputs rounded to `int8`, `int6` or `int4` too.

A weight is scale * (code - 2^(b-1)), scale = max|w| / (2^(b-1) - 1). The scale is stored in fp16,
the zero is a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.format_words import SIDE_BITS, groups_of
from ...core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..codes import Codes
    from ..packed_weight import AbstractPackedWeight

family = "int"
words = tuple(f"int{b}" for b in range(2, 9))
inputs = {f"int{b}": f"int{b}" for b in (8, 6, 4)}
sizes = "tcg"
multiplied_as = "int"
stores_zero = False
follows_range = True
has_grid = True


def bits(word: str) -> int:
    """The number in the word."""
    return int(word.removeprefix("int"))


def group(word: str) -> int:
    """A channel, where a scheme says nothing."""
    return 0


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, and a scale a group."""
    return bits(word) * rows * columns + groups_of(rows, columns, group) * SIDE_BITS


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group], to nearest between the ends of each group."""
    from ..codes import round_to_nearest

    return round_to_nearest(groups, scheme)


def qparams_from_range(low: Tensor, high: Tensor, word: str) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid that reaches the larger of |low| and |high|."""
    import torch

    from ..codes import round_to_fp16

    half = 2 ** (bits(word) - 1)
    scale = round_to_fp16(torch.maximum(low.abs(), high.abs()) / (half - 1))
    return scale, torch.full_like(scale, half)


def quantize_to_grid(
    groups: Tensor, scale: Tensor, zero: Tensor, word: str, unit: float = 1.0
) -> Codes:
    """Each number to its nearest code."""
    from ..codes import whole_codes

    return whole_codes(groups, scale, zero, bits(word))


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, word: str) -> Tensor:
    """What `quantize_to_grid` makes of `x`, in floating point."""
    return quantize_to_grid(x, scale, zero, word).values()


def level_ends(word: str, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of the grid in units of the scale."""
    return -zero, 2 ** bits(word) - 1 - zero


def level_table(word: str, device: torch.device | str) -> Tensor | None:
    """A code's level is its number."""
    return None


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Codes, signed bytes where they have 8 bits, and scales."""
    from ..packed_weight import Layout, PackedWeight

    layout = Layout(signed=bits(scheme.format) == 8, offset=2.0 ** (bits(scheme.format) - 1))
    return PackedWeight(scheme, rows, columns, device, layout)
