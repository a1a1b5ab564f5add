"""LayerNorm or RMSNorm, adaLN's modulation, and rounding in one pass over the row.

What a transformer block's linear layers read is made here, and read once: 2 bytes in, 1 out. As
three operations it would be 11 bytes an element, which at 1152 columns costs a third of the integer
product that follows. The row is rounded once for Q, K and V.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference_a8 import Rows, form_of
from .launching import Launch, rows_of
from .quantize import empty_rows
from .rounding import blocks_of, store_row, taken, warps_of


@triton.jit
def _moved(
    y, at, K, weight, bias, modulation_scale, modulation_shift, shift, divisor, MASKED: tl.constexpr
):
    if weight is not None:
        y *= taken(weight, at, K, 0.0, MASKED)
    if bias is not None:
        y += taken(bias, at, K, 0.0, MASKED)
    if modulation_scale is not None:
        y *= 1.0 + taken(modulation_scale, at, K, 0.0, MASKED)
    if modulation_shift is not None:
        y += taken(modulation_shift, at, K, 0.0, MASKED)
    if shift is not None:
        y -= taken(shift, at, K, 0.0, MASKED)
    if divisor is not None:
        y = y / taken(divisor, at, K, 1.0, MASKED)
    return y


@triton.jit
def _centred(y, mean, at, K, MASKED: tl.constexpr):
    y -= mean
    if MASKED:
        y = tl.where(at < K, y, 0.0)
    return y


@triton.jit
def _norm_quantize(
    x, codes, scale_out, zero_out, sums, weight, bias, modulation_scale, modulation_shift, shift,
    divisor, x_stride, K, per_batch, eps,
    RMS: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = x + row.to(tl.int64) * x_stride
    at, after = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL > 0 else 1)
    first = taken(begin, at, K, 0.0, MASKED)
    second = taken(begin, after, K, 0.0, True) if TAIL > 0 else first
    if not RMS:
        total = tl.sum(first, axis=0)
        if TAIL > 0:
            total += tl.sum(second, axis=0)
        first = _centred(first, total / K, at, K, MASKED)
        second = _centred(second, total / K, after, K, True) if TAIL > 0 else first
    power = tl.sum(first * first, axis=0)
    if TAIL > 0:
        power += tl.sum(second * second, axis=0)
    factor = 1.0 / tl.sqrt(power / K + eps)
    if modulation_scale is not None:
        modulation_scale += row // per_batch * K
    if modulation_shift is not None:
        modulation_shift += row // per_batch * K
    first = _moved(
        first * factor,
        at,
        K,
        weight,
        bias,
        modulation_scale,
        modulation_shift,
        shift,
        divisor,
        MASKED,
    )
    second = (
        _moved(
            second * factor,
            after,
            K,
            weight,
            bias,
            modulation_scale,
            modulation_shift,
            shift,
            divisor,
            True,
        )
        if TAIL > 0
        else first
    )
    store_row(
        first,
        second,
        row,
        K,
        codes,
        scale_out,
        zero_out,
        sums,
        None,
        None,
        1,
        BITS,
        TOP,
        GROUP,
        MAIN,
        TAIL,
        MASKED,
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
) -> tuple[tuple[Launch, ...], Rows]:
    """The launches (none where there are no rows) and the rows that they fill:
    `reference_a8.norm_quantize`. Raises `ValueError` for what it can't do.
    """
    rows = rows_of(x)
    out = empty_rows(x.shape[:-1], x.shape[-1], form, group, None, x.device)
    if not len(rows):
        return (), out
    batches = {len(m) for m in (modulation_scale, modulation_shift) if m is not None} or {1}
    if len(batches) > 1 or 0 in batches or len(rows) % min(batches):
        raise ValueError(
            f"rows are shared out in equal runs; given {len(rows)} rows and modulations "
            f"for {sorted(batches)} batches"
        )
    bits, top = form_of(form)
    arguments = {
        "x": rows, "codes": out.codes, "scale_out": out.scale, "zero_out": out.zero,
        "sums": out.sums, "weight": weight, "bias": bias,
        "modulation_scale": None if modulation_scale is None else modulation_scale.contiguous(),
        "modulation_shift": None if modulation_shift is None else modulation_shift.contiguous(),
        "shift": shift, "divisor": divisor, "x_stride": rows.stride(0), "K": x.shape[-1],
        "per_batch": len(rows) // batches.pop(), "eps": eps,
        "RMS": rms, "BITS": bits, "TOP": top, "GROUP": group,
        **blocks_of(x.shape[-1], group),
    }  # fmt: skip
    return (
        Launch(_norm_quantize, (len(rows),), arguments, warps=warps_of(x.shape[-1]), stages=1),
    ), out
