"""What every operation means, in plain torch: the slow twin beside each kernel, with the same
signature.

A weight is `scale * (level - zero)`, with one scale and one zero for each group of a row. Its level
is the code itself or, with `levels`, the entry that the code names: of one table for all (a small
float format) or of the group's own (a codebook). Codes are unsigned; symmetric integers are stored
with their offset, so that their zero is the number 2**(bits - 1). Zeros are in units of a code and
need not be whole.

Reference means: computed in at least float32 from start to end, rounded once, to the type of the
result. A kernel may order its sums differently, and is compared with a tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import unpack


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | float, group: int, levels: Tensor | None = None
) -> Tensor:
    """Weight [rows, columns], in the type of `scale`, from unsigned `codes` [rows, columns].

    `group`: neighbours in a row that share a scale, the last group of a row may be incomplete; 0 =
    the whole row, -1 = the whole weight. `scale`: [rows, groups a row], for -1 [1, 1]. `zero`: the
    same shape, or one number for all. `levels`: [2**bits], or of the shape of `scale` with 2**bits
    entries besides. Raises `ValueError` for other shapes.
    """
    rows, columns = codes.shape
    groups = -(-columns // group) if group > 0 else 1
    shape = (1 if group == -1 else rows, groups)
    codebook = None if levels is None or levels.ndim == 1 else levels[..., 0]
    for name, values in (("scale", scale), ("zero", zero), ("codebook", codebook)):
        if isinstance(values, Tensor) and (given := tuple(values.shape)) != shape:
            raise ValueError(
                f"codes {rows} x {columns} in groups of {group} need a {name} of shape "
                f"{shape}; given {given}"
            )
    exact = torch.promote_types(scale.dtype, torch.float32)
    level = codes.to(exact) if levels is None else _levels(codes, levels.to(exact), group)
    offset = _spread(zero.to(exact), group, columns) if isinstance(zero, Tensor) else zero
    return ((level - offset) * _spread(scale.to(exact), group, columns)).to(scale.dtype)


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
    levels: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` [..., rows], in the type of `x`: low-bit weights, activations [...,
    columns] as they are.

    `packed`: codes of `bits` bits in the layout of `layout.py`, uint8 [rows, row bytes] (8-bit
    integers int8); `scale`, `zero`, `group`, `levels` as in `dequantize`; `bias`: [rows].
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = dequantize(unpack(packed, bits, columns), scale.to(exact), zero, group, levels)
    return torch.nn.functional.linear(
        x.to(exact), weight, None if bias is None else bias.to(exact)
    ).to(x.dtype)


def convolved(
    places: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The size along each axis of what a convolution makes of `places`."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(places, kernel, stride, padding, dilation, strict=True)
    ]


def grid(
    x: Tensor,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    axes: tuple[int, ...] = (-1,),
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the unsigned `activation`-bit grid between `low` and `high`, zero among
    them; None = the ends of `x` itself along `axes`.

    A scale is a value of fp16, a zero a whole code: as `qsearch` simulates them.
    """
    top = 2**activation - 1
    low = (x.amin(axes, keepdim=True) if low is None else low).clamp(max=0)
    high = (x.amax(axes, keepdim=True) if high is None else high).clamp(min=0)
    scale = as_fp16(((high - low) / top).clamp(min=2.0**-24, max=65504.0))
    return scale, (-low / scale).round().clamp(0, top)


def as_fp16(x: Tensor) -> Tensor:
    """fp32 numbers above zero as fp16 stores them. While a graph is being written down it is done
    to their bits, since compilers take `half().float()` for nothing.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is None:
        return x.half().float()
    bits = x.view(torch.int32)
    nearest = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(
        torch.float32
    )  # ties to even, as all of torch
    return torch.where(
        x < 2.0**-14, (x * 2.0**24).round() * 2.0**-24, nearest
    )  # below are fp16's subnormals


def rounded(
    x: Tensor,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    axes: tuple[int, ...] = (-1,),
) -> Tensor:
    """fp32 `x` on that grid: `scale * (code - zero)`."""
    scale, zero = grid(x, activation, low, high, axes=axes)
    return scale * ((x / scale + zero).round().clamp(0, 2**activation - 1) - zero)


def linear_wnaxi(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    *,
    bits: int,
    columns: int,
    group: int,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
    bias: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """`linear_wna16` of `x` rounded to `activation` bits, row by row, or between `low` and `high`
    (fp32, one for all rows or [..., 1]).
    """
    made = rounded(x.float(), activation, low, high)
    return linear_wna16(
        made, packed, scale, zero, bits=bits, columns=columns, group=group, bias=bias, levels=levels
    ).to(x.dtype)


def conv2d_wnaxi(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    *,
    bits: int,
    columns: int,
    group: int,
    activation: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    low: Tensor | None = None,
    high: Tensor | None = None,
    bias: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """2-D convolution [batch, rows, h, w] of pictures [batch, channels, H, W] rounded each to a
    grid of its own, padded with zeros after rounding.

    `columns` = channels times the kernel's places, in torch's order; the rest as in `linear_wnaxi`.
    """
    made = rounded(x.float(), activation, low, high, axes=(1, 2, 3))
    weight = dequantize(unpack(packed, bits, columns), scale.float(), zero, group, levels).view(
        -1, x.shape[1], *kernel
    )
    return torch.nn.functional.conv2d(
        made, weight, None if bias is None else bias.float(), stride, padding, dilation
    ).to(x.dtype)


def _levels(codes: Tensor, levels: Tensor, group: int) -> Tensor:
    """[rows, columns]: the entries of tables [entries] or [rows, groups, entries] that codes
    name.
    """
    if levels.ndim == 1:
        return levels[codes.int()]
    if group <= 0:
        return levels[:, 0].expand(len(codes), -1).gather(1, codes.long())
    columns = codes.shape[1]
    place = torch.arange(columns, device=codes.device) // group * levels.shape[-1] + codes.long()
    return levels.flatten(1).gather(1, place)


def _spread(values: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] -> a value for each column, or as it is where one value serves the whole
    row.
    """
    return values[:, :, None].expand(-1, -1, group).flatten(1)[:, :columns] if group > 0 else values
