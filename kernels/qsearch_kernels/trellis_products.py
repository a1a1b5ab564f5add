"""Products with trellis-coded weights in plain torch: the slow twins of `gpu/linear_trellis.py`.

A weight is `w_scale * level`, its levels whole numbers of 8 bits (`trellis.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference_a8, trellis


def linear_trellis(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bits: int = 2,
    states: int = 12,
    bias: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` [..., N] in the type of `x` [..., K], rounded once.

    `packed`: uint8 `trellis.packed_shape`; `w_scale`: [N].
    """
    scale = w_scale.reshape(-1, 1)
    weight = trellis.dequantize(packed, scale, bits, states, x.shape[-1], torch.float64)
    return F.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)


def linear_trellis_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_total: Tensor | None = None,
    bits: int = 2,
    states: int = 12,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`reference_a8.linear_a8` [..., N] for int8 rows `codes` [..., K] and a trellis-coded weight.

    `w_total`: fp32 [N], the sum of each row of weights, needed with `a_zero`.
    """
    scale = w_scale.reshape(-1).float()
    level = trellis.decode(packed, bits, states, len(scale), codes.shape[-1])
    return reference_a8.linear_a8(
        codes, a_scale, a_zero, None, level, scale, None, w_total, bias, gate, residual, dtype
    )
