"""Asymmetric integers, `uint2` to `uint8`: a scale and a zero point; the grid of inputs rounded to
8, 6 or 4 bits too.

A weight is scale * (code - zero), scale = (max - min) / (2^b - 1) with the range widened to hold 0,
and zero rounded to a code. Both are stored in fp16, since some methods (HQQ) choose zeros that are
no whole numbers.
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

family = "uint"
words = tuple(f"uint{b}" for b in range(2, 9))
inputs = {str(b): f"uint{b}" for b in (8, 6, 4)}
sizes = "tcg"
multiplied_as = "int"
stores_zero = True
follows_range = True
has_grid = True


def bits(word: str) -> int:
    """The number in the word."""
    return int(word.removeprefix("uint"))


def group(word: str) -> int:
    """A channel, where a scheme says nothing."""
    return 0


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, and a scale and a zero a group."""
    return bits(word) * rows * columns + groups_of(rows, columns, group) * 2 * SIDE_BITS


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group], to nearest between the ends of each group."""
    from ..codes import round_to_nearest

    return round_to_nearest(groups, scheme)


def qparams_from_range(low: Tensor, high: Tensor, word: str) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid from `low` to `high`, widened to hold zero."""
    from ..codes import round_to_fp16

    top = 2 ** bits(word) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_to_fp16((high - low) / top)
    return scale, (-low / scale).round().clamp(0, top)


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
    """Codes, signed bytes where they have 8 bits, scales and zeros."""
    from ..packed_weight import Layout, PackedWeight

    layout = Layout(signed=bits(scheme.format) == 8, zero=True)
    return PackedWeight(scheme, rows, columns, device, layout)
