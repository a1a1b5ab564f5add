"""Trellis codes, `tcq2` to `tcq4`: a row's weights are a path through a trellis of 2^12 states,
near the rate-distortion limit.

QTIP (arXiv 2406.11235) codes weights of language models so; here levels are computed from the
state, whole numbers of 8 bits with one scale a row, which int8 products multiply as they are
(`qsearch_kernels.trellis`). With `@ldlq` errors are fed back to later columns by second moments of
the inputs, and `~rotate` makes weights the Gaussian numbers that the levels are made for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qsearch_kernels.trellis_layout import COLUMNS, packed_shape

from ...core.errors import QSearchError
from ...core.format_words import SIDE_BITS
from ...core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..packed_weight import AbstractPackedWeight
    from ..trellis import TrellisCodes

family = "trellis"
words = ("tcq2", "tcq3", "tcq4")
inputs: dict[str, str] = {}
sizes = "c"
multiplied_as = "int"
stores_zero = False
follows_range = False
has_grid = False
#: rows under which a tile's path is so short that closing it costs more than a trellis gains
LEAST_ROWS = 16


def bits(word: str) -> int:
    """The number in the word."""
    return int(word.removeprefix("tcq"))


def group(word: str) -> int:
    """A channel."""
    return 0


def too_small(rows: int, columns: int) -> str:
    """Why a weight [rows, columns] has no trellis code, in words; "" where it has one."""
    if rows >= LEAST_ROWS and columns >= COLUMNS:
        return ""
    return (
        f"a trellis code needs at least {LEAST_ROWS} rows of {COLUMNS} columns for its path; "
        "choose a scalar format, such as int8-c"
    )


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Whole tiles, and a scale a row. Raises `QSearchError` for a weight smaller than a tile."""
    if fault := too_small(rows, columns):
        raise QSearchError(f"{word} can't store a weight of {rows} x {columns}: {fault}")
    return 8 * math.prod(packed_shape(rows, columns, bits(word))) + SIDE_BITS * rows


def quantize(groups: Tensor, scheme: Scheme) -> TrellisCodes:
    """Codes of fp32 groups [rows, 1, columns], each weight coded for itself."""
    return quantize_with_feedback(groups, scheme, None)


def quantize_with_feedback(groups: Tensor, scheme: Scheme, moments: Tensor | None) -> TrellisCodes:
    """Codes of fp32 groups [rows, 1, columns] whose errors are fed back by `moments` [columns,
    columns] of the inputs.
    """
    from ..trellis import trellis_codes

    return trellis_codes(groups.flatten(1), scheme.bits, moments=moments)


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Tiles, and a scale a row."""
    from ..trellis_weight import TrellisWeight

    return TrellisWeight(scheme, rows, columns, device)
