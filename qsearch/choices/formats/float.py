"""Small floats, `e2m1` to `e5m2`: a sign, exponent and mantissa bits, and a scale; grids of inputs
too.

Levels have a top between 1 and 2, so that the scale is about the clip value and fits fp16: FP4DiT's
real-valued exponent bias (arXiv 2503.15465, eq. 2) is that scale, since b = 2^E - log2(c) + log2(2
- 2^-M) - 1 depends on the clip value c alone.
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

family = "float"
words = ("e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2")
inputs = {word: word for word in ("e4m3", "e5m2", "e3m4", "e2m3", "e3m2", "e2m1")}
sizes = "tcg"
multiplied_as = "float"
stores_zero = False
follows_range = True
has_grid = True


def bits(word: str) -> int:
    """A sign, the exponent and the mantissa."""
    return 1 + int(word[1]) + int(word[3])


def group(word: str) -> int:
    """A channel, where a scheme says nothing."""
    return 0


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, and a scale a group."""
    return bits(word) * rows * columns + groups_of(rows, columns, group) * SIDE_BITS


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group], to nearest; the largest of each group is the
    largest value.
    """
    from ..codes import round_to_nearest

    return round_to_nearest(groups, scheme)


def qparams_from_range(low: Tensor, high: Tensor, word: str) -> tuple[Tensor, Tensor]:
    """Scale of the grid that reaches the larger of |low| and |high|; zeros."""
    import torch

    from ..codes import round_to_fp16
    from ..floats import FloatFormat

    scale = round_to_fp16(torch.maximum(low.abs(), high.abs()) / FloatFormat.named(word).own_top)
    return scale, torch.zeros_like(scale)


def quantize_to_grid(
    groups: Tensor, scale: Tensor, zero: Tensor, word: str, unit: float = 1.0
) -> Codes:
    """Each number to its nearest code."""
    import torch

    from ..codes import Codes
    from ..floats import FloatFormat

    form = FloatFormat.named(word)
    codes = form.encode(groups / (scale * unit) * 2.0**form.highest)
    return Codes(codes, scale, torch.zeros_like(scale), level_table(word, groups.device), unit)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, word: str) -> Tensor:
    """The same numbers as by `quantize_to_grid`, without a table of them."""
    from ..floats import FloatFormat

    form = FloatFormat.named(word)
    return scale * (form.round(x / scale * 2.0**form.highest) / 2.0**form.highest)


def level_ends(word: str, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of the grid in units of the scale."""
    import torch

    from ..floats import FloatFormat

    top = torch.full_like(zero, FloatFormat.named(word).own_top)
    return -top, top


def level_table(word: str, device: torch.device | str) -> Tensor:
    """fp32 [2^bits]: what each code stands for in units of the scale."""
    from ..floats import FloatFormat

    form = FloatFormat.named(word)
    return form.values(device) / 2.0**form.highest


def element(word: str) -> str:
    """The float format that a code spells."""
    return word


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Codes and scales; the table of levels is part of the format and not stored."""
    from ..packed_weight import Layout, PackedWeight

    return PackedWeight(
        scheme, rows, columns, device, Layout(table=level_table(scheme.format, "cpu"))
    )
