"""LDLQ: errors are fed back to the columns to come by second moments of the inputs, a block of
columns at a time.

The rounding of QuIP# (arXiv 2402.04396, section 4.1) and, of blocks of one column, GPTQ's with
scales that are chosen beforehand. A trellis code is rounded a tile of four columns at a time
(`choices/feedback.py`); formats with a grid column by column.
"""

from __future__ import annotations

from torch import Tensor

from ...core.scheme import Scheme
from ..codes import AbstractCodes, qparams_from_range, quantize_to_grid
from ..feedback import with_feedback
from ..format import has_grid
from ..formats import trellis
from ..moments import columns_of, from_columns

needs_inputs = True
integer_zeros = True
learns_blocks = False


def supports(scheme: Scheme) -> bool:
    """Trellis codes, and formats whose scale is any number."""
    return scheme.family == trellis.family or has_grid(scheme)


def quantize(groups: Tensor, scheme: Scheme, moments: Tensor) -> AbstractCodes:
    """Codes of fp32 groups [rows, groups, group] for inputs with `moments` [columns, columns]."""
    if scheme.family == trellis.family:
        return trellis.quantize_with_feedback(groups, scheme, moments)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = qparams_from_range(low, high, scheme)
    rows = columns_of(groups, scheme, moments)

    def rounded(columns: Tensor, begin: int) -> Tensor:
        place = begin // scheme.group if scheme.group > 0 else 0
        own, shift = (x[:, place : place + 1].expand(len(columns), -1, -1) for x in (scale, zero))
        made: Tensor = quantize_to_grid(columns[:, None], own, shift, scheme).values()[:, 0]
        return made

    values = with_feedback(rows, 1, moments.to(rows), rounded, "the weight")
    return quantize_to_grid(from_columns(values, groups, scheme), scale, zero, scheme)
