"""What every operation means, in plain torch: the slow twin beside each kernel, with the same signature.

A weight is `scale * (code - zero)`, with one scale and one zero for each group of a row. Codes are unsigned; symmetric integers are stored
with their offset, so that their zero is the number 2**(bits - 1). Zeros are in units of a code and need not be whole.

Reference means: computed in at least float32 from start to end, rounded once, to the type of the result. A kernel may order its sums
differently, and is compared with a tolerance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import unpack


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | float, group: int) -> Tensor:
    """Weight [rows, columns], in the type of `scale`, from unsigned `codes` [rows, columns].

    `group`: neighbours in a row that share a scale, the last group of a row may be incomplete; 0 = the whole row, -1 = the whole weight.
    `scale`: [rows, groups a row], for -1 [1, 1]. `zero`: the same shape, or one number for all.
    """
    rows, columns = codes.shape
    groups = -(-columns // group) if group > 0 else 1
    shape = (1 if group == -1 else rows, groups)
    for name, values in (("scale", scale), ("zero", zero)):
        if isinstance(values, Tensor) and tuple(values.shape) != shape:
            raise ValueError(f"codes {rows} x {columns} in groups of {group} need a {name} of shape {shape}; given {tuple(values.shape)}")
    exact = torch.promote_types(scale.dtype, torch.float32)
    offset = _spread(zero.to(exact), group, columns) if isinstance(zero, Tensor) else zero
    return ((codes.to(exact) - offset) * _spread(scale.to(exact), group, columns)).to(scale.dtype)


def linear_wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    *,
    bits: int,
    columns: int,
    group: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` [..., rows], in the type of `x`: low-bit weights, activations [..., columns] as they are.

    `packed`: codes of `bits` bits in the layout of `layout.pack`, uint8 [rows, row bytes]; `scale`, `zero`, `group` as in `dequantize`; `bias`: [rows].
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(unpack(packed, bits, columns), scale.to(exact), zero, group)
    return torch.nn.functional.linear(x.to(exact), weight, None if bias is None else bias.to(exact)).to(x.dtype)


def _spread(values: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] -> a value for each column, or as it is where one value serves the whole row."""
    return values.repeat_interleave(group, dim=1)[:, :columns] if group > 0 else values
