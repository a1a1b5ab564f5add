"""Fixed levels on int8's grid, `cb4`: 16 Lloyd-Max levels, an e4m3 scale for 16 weights and an fp16
scale a row.

A weight is row scale * round(level[code] * block scale). What is rounded is an int8, so that cb4 is
stored in the bits of `nvfp4` and multiplied with inputs rounded to integers as `int8-c` is
(comfy-kitchen's `asym_w4a8_int8`, issue 90 there). The levels are made for Gaussian weights:
`~rotate` makes weights such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.format_words import SIDE_BITS, groups_of
from ...core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..int8_codebook import LevelCodes
    from ..packed_weight import AbstractPackedWeight

family = "block"
words = ("cb4",)
inputs: dict[str, str] = {}
sizes = ""
multiplied_as = "int"
stores_zero = False
follows_range = False
has_grid = False
_BLOCK, _SCALE_BITS = 16, 8


def bits(word: str) -> int:
    """Of a code, which names one of 16 levels."""
    return 4


def group(word: str) -> int:
    """A block."""
    return _BLOCK


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, a scale a block, and one a row."""
    blocks = groups_of(rows, columns, group)
    return bits(word) * rows * columns + blocks * _SCALE_BITS + rows * SIDE_BITS


def quantize(groups: Tensor, scheme: Scheme) -> LevelCodes:
    """Codes of fp32 blocks [rows, blocks, 16]."""
    from ..int8_codebook import level_codes

    return level_codes(groups)


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Codes, block scales as bytes, and a scale a row."""
    from ..int8_codebook import LevelWeight

    return LevelWeight(scheme, rows, columns, device)
