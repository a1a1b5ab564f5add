"""What operations on 8-bit activations mean, in plain torch: the slow twins of the kernels in
`gpu/`, with the same arguments in the same order.

A rounded row of activations is `scale * (code - zero)`. Codes are signed (int8, or e4m3 with no
zero), so that tensor cores multiply them as they are: an unsigned code of b bits less 2**(b - 1),
and its zero likewise. Scales are values of fp16, as `qsearch` stores them. The product of a row
with a row of weights `w_scale * (w - w_zero)` is then

    scale * (w_scale * (sum of codes * w - w_zero * sum of codes) - zero * w_total),
        w_total = the sum of the row's weights

in which the integer sum is exact. A row that holds something not finite gets the scale NaN, and
with it all of its outputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import unpack
from .reference import as_fp16
from .reference_levels import unsigned

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of fp16
#: forms of an activation -> bits of an integer code, or 0 and the largest float
FORMS = {**{str(bits): (bits, 0.0) for bits in range(2, 9)}, "e4m3": (0, 448.0)}
#: what may happen to a row before it is rounded; geglu takes twice the columns, its gate in the
#: second half
ACTIVATIONS = ("", "gelu", "gelu-tanh", "silu", "geglu")


class Rows(NamedTuple):
    """Rounded rows. `codes`: int8 or e4m3 [..., columns]; `scale`, `zero`: fp32 [rows]; `sums`:
    int32 [rows, groups], of the codes of each group.

    `zero` and `sums` are all zeros for e4m3, which needs neither.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor


def form_of(form: str) -> tuple[int, float]:
    """(bits of an integer, 0 for floats; largest float) of an activation's form. Raises
    `ValueError` for others.
    """
    if form not in FORMS:
        raise ValueError(f"activations are rounded to one of {', '.join(FORMS)}; given {form!r}")
    return FORMS[form]


def grid_of(rows: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(scale, zero) fp32 [rows] of fp32 rows [rows, columns]: from smallest to largest entry, zero
    among them; floats symmetric about zero.
    """
    bits, top = form_of(form)
    low, high, last = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0), 2**bits - 1
    finite = (
        low + high
        # of opposite signs, so that their sum overflows only where one did; multiplied by 0 a
        # compiler would take it for 0
    ).isfinite()
    if not bits:
        scale = _stored(torch.maximum(high, -low) / top)
        return scale.where(finite, torch.nan), torch.zeros_like(scale)
    scale = _stored((high - low) / last)
    return scale.where(finite, torch.nan), (-low / scale).round().clamp(0, last) - 2 ** (bits - 1)


def quantize_rows(
    x: Tensor,
    form: str = "8",
    activation: str = "",
    shift: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> Rows:
    """Rows of `(activation(x) - shift) / divisor`, rounded to `form`.

    `x`: [..., columns] (geglu: [..., 2 * columns]), any float type and strides; `shift`, `divisor`:
    fp32 [columns]. `scale`, `zero`: fp32 [grids], a static grid for each of as many equal runs of
    rows; None = each row's own. `group`: columns a sum in `sums`, 0 = all.
    """
    return _rounded(
        _prepared(_activated(x, activation), shift, divisor), x.shape[:-1], form, scale, zero, group
    )


def norm_quantize(
    x: Tensor,
    form: str = "8",
    rms: bool = False,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    shift: Tensor | None = None,
    divisor: Tensor | None = None,
    group: int = 0,
) -> Rows:
    """Rows of `norm(x) * (1 + modulation_scale) + modulation_shift`, moved and rounded as in
    `quantize_rows`.

    `x`: [..., columns]; LayerNorm, or RMSNorm where `rms`; `weight`, `bias`: [columns].
    Modulations: [batches, columns], for as many equal runs of rows (adaLN).
    """
    rows = _flat(x)
    centred = rows if rms else rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    y = y if modulation_scale is None else y * (1 + _each_row(modulation_scale.float(), len(rows)))
    y = y if modulation_shift is None else y + _each_row(modulation_shift.float(), len(rows))
    return _rounded(_prepared(y, shift, divisor), x.shape[:-1], form, None, None, group)


def linear_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    sums: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None = None,
    w_total: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`residual + gate * (activations @ weights.T + bias)` [..., N] in `dtype`, from 8-bit codes of
    both.

    `codes`: [..., K], `a_scale`, `a_zero`: [grids] as in `quantize_rows`, `sums`: [rows, 1]; needed
    with `w_zero`. `weight`: [N, K] of the type of `codes`, its `w_scale`, `w_zero`: fp32 [N] (zero
    in signed codes); `w_total`: fp32 [N], needed with `a_zero`. `gate`: [batches, N], `residual`:
    [..., N], `bias`: [N].
    """
    values = w_scale[:, None].double() * (
        weight.double() - (0 if w_zero is None else w_zero[:, None].double())
    )
    return _finished(
        codes.reshape(-1, codes.shape[-1]).double(),
        codes.shape[:-1],
        a_scale,
        a_zero,
        values,
        bias,
        gate,
        residual,
        dtype,
    )


def linear_packed_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    sums: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None = None,
    w_total: Tensor | None = None,
    table: Tensor | None = None,
    bits: int = 4,
    group: int = 0,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`linear_a8` with weights of `bits` bits in the layout of `layout.pack`, uint8 [N, row bytes]
    (or int8 [N, K], for 8 bits), with a scale for each `group` of columns (0 = a row).

    A weight is `w_scale * (level - w_zero)`. Level: the code less 2**(bits - 1), or its entry in
    `table`, int8 [N or 1, 2**bits] (whole numbers that stand for a codebook or a small float
    format). `w_scale`, `w_zero`: fp32 [N, groups]; `sums`: [rows, groups], needed with `w_zero`.
    """
    columns = codes.shape[-1]
    numbers = unpack(unsigned(packed), bits, columns).long()
    level = (
        numbers - 2 ** (bits - 1)
        if table is None
        else table.expand(len(numbers), -1).gather(1, numbers)
    )
    wide = group or max(1, columns)
    scale, zero = (
        None if v is None else v.double().repeat_interleave(wide, 1)[:, :columns]
        for v in (w_scale, w_zero)
    )
    assert scale is not None
    values = scale * (level.double() - (0 if zero is None else zero))
    return _finished(
        codes.reshape(-1, columns).double(),
        codes.shape[:-1],
        a_scale,
        a_zero,
        values,
        bias,
        gate,
        residual,
        dtype,
    )


def conv2d_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_total: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """2-D convolution [batch, P, Q, N] in `dtype` of int8 pictures `codes` [batch, H, W, C] with
    int8 weights [N, R, S, C], plus `residual`.

    Channels last, on both sides. `a_scale`, `a_zero`: fp32 [batch], a grid for each picture; what
    lies outside it is its zero, so that it stands for 0. `w_scale`, `w_total`: fp32 [N] as in
    `linear_a8`; `bias`: [N]; `residual`: [batch, P, Q, N].
    """
    picture = a_scale.double()[:, None, None, None] * (
        codes.double() - a_zero.double()[:, None, None, None]
    )
    values = weight.double() * w_scale.double()[:, None, None, None]
    y = F.conv2d(
        picture.permute(0, 3, 1, 2),
        values.permute(0, 3, 1, 2),
        None if bias is None else bias.double(),
        stride,
        padding,
        dilation,
    )
    y = y.permute(0, 2, 3, 1)
    return (y if residual is None else y + residual.double()).to(dtype).contiguous()


def whole_numbers(table: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [rows, entries], scale fp32 [rows]): a codebook in eight bits, its largest entry at
    127; adds at most half of scale to a weight's error.

    A table of a small float format whose values are multiples of one step no smaller than 1/127 of
    its largest comes out exact when multiplied by it first.
    """
    scale = (table.float().abs().amax(-1) / 127).clamp(min=2.0**-126)
    return (table.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _rounded(
    rows: Tensor,
    shape: torch.Size,
    form: str,
    scale: Tensor | None,
    zero: Tensor | None,
    group: int,
) -> Rows:
    """`Rows` of fp32 [rows, columns]; `shape`: of the rows, as the caller has them."""
    bits, top = form_of(form)
    scale, zero = (
        (scale.clone(), torch.zeros_like(scale) if zero is None else zero.clone())
        if scale is not None
        else grid_of(rows, form)
    )
    s, z = _each_row(scale[:, None], rows.shape[0]), _each_row(zero[:, None], rows.shape[0])
    half = 2 ** (bits - 1) if bits else 0
    codes = (
        (rows / s + z + half).round().clamp(0, 2 * half - 1).sub(half).nan_to_num(0).to(torch.int8)
        if bits
        else (rows / s).clamp(-top, top).to(torch.float8_e4m3fn)
    )
    wide = group or max(1, rows.shape[-1])
    whole = (
        F.pad(codes, (0, -rows.shape[-1] % wide)).int()
        if bits
        else torch.zeros(
            rows.shape[0], max(1, -(-rows.shape[-1] // wide)) * wide, dtype=torch.int32
        )
    )
    sums = (
        whole.unflatten(-1, (-1, wide)).sum(-1, dtype=torch.int32)
        if whole.shape[-1]
        else whole.new_zeros(rows.shape[0], 1)
    )
    return Rows(codes.view(*shape, rows.shape[-1]), scale, zero, sums.to(codes.device))


def _finished(
    codes: Tensor,
    shape: torch.Size,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product in float64, gate and residual after it; rounded once."""
    zeros = 0 if zero is None else _each_row(zero.double()[:, None], len(codes))
    y = F.linear(
        _each_row(scale.double()[:, None], len(codes)) * (codes - zeros),
        weight,
        None if bias is None else bias.double(),
    )
    y = y if gate is None else y * _each_row(gate.double(), len(codes))
    y = y if residual is None else y + residual.reshape(len(codes), -1).double()
    return y.to(dtype).view(*shape, weight.shape[0])


def _each_row(values: Tensor, rows: int) -> Tensor:
    """[runs, ...] -> [rows, ...]: each for as many rows as come to it. Shapes and no `len`, which a
    compiler takes for a number that never changes.
    """
    if rows == 0:
        return values[:0]
    if values.shape[0] == 0 or rows % values.shape[0]:
        raise ValueError(
            f"rows are shared out in equal runs; given {rows} rows and {values.shape[0]} runs"
        )
    return values.repeat_interleave(rows // values.shape[0], 0)


def _flat(x: Tensor) -> Tensor:
    """fp32 [rows, columns], of an empty batch too."""
    return x.reshape(
        math.prod(x.shape[:-1]), x.shape[-1]
    ).float()  # `Size.numel` would be a fixed number to a compiler


def _activated(x: Tensor, kind: str) -> Tensor:
    """fp32 [rows, columns] after the activation function."""
    if kind not in ACTIVATIONS:
        raise ValueError(
            f"an activation is one of {', '.join(repr(a) for a in ACTIVATIONS)}; given {kind!r}"
        )
    rows = _flat(x)
    if kind == "geglu":
        hidden, gate = rows.chunk(2, -1)
        return hidden * F.gelu(gate)
    if kind == "silu":
        return F.silu(rows)
    return F.gelu(rows, approximate="tanh" if kind == "gelu-tanh" else "none") if kind else rows


def _prepared(rows: Tensor, shift: Tensor | None, divisor: Tensor | None) -> Tensor:
    rows = rows if shift is None else rows - shift.float()
    return rows if divisor is None else rows / divisor.float()


def _stored(scale: Tensor) -> Tensor:
    """A scale as fp16 stores it, above zero."""
    return as_fp16(scale.clamp(min=_SMALLEST, max=_LARGEST))
