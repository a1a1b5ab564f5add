"""LayerNorm or RMSNorm, adaLN's modulation, and rounding in one pass over the row.

What a transformer block's linear layers read is made here, and read once: 2 bytes in, 1 out. As three operations it would be 11 bytes an element, which at 1152
columns costs a third of the integer product that follows. The row is rounded once for Q, K and V.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference_a8 import Rows, form_of
from .launching import Launch, power_of_two, rows_of
from .quantize import empty_rows, store_row, warps_of


@triton.jit
def _norm_quantize(
    x, codes, scale_out, zero_out, sums, weight, bias, modulation_scale, modulation_shift, shift, divisor, x_stride, K, per_batch, eps,
    RMS: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < K
    y = tl.load(x + row.to(tl.int64) * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    if not RMS:
        y = tl.where(mask, y - tl.sum(y, axis=0) / K, 0.0)
    y *= 1.0 / tl.sqrt(tl.sum(y * y, axis=0) / K + eps)
    if weight is not None:
        y *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    batch = row // per_batch * K
    if modulation_scale is not None:
        y *= 1.0 + tl.load(modulation_scale + batch + at, mask=mask, other=0.0).to(tl.float32)
    if modulation_shift is not None:
        y += tl.load(modulation_shift + batch + at, mask=mask, other=0.0).to(tl.float32)
    if shift is not None:
        y -= tl.load(shift + at, mask=mask, other=0.0)
    if divisor is not None:
        y = tl.div_rn(y, tl.load(divisor + at, mask=mask, other=1.0))
    store_row(y, row, at, mask, codes, scale_out, zero_out, sums, None, None, 1, K, BITS, TOP, GROUP, BLOCK)


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
    """The launches (none where there are no rows) and the rows that they fill: `reference_a8.norm_quantize`. Raises `ValueError` for what it can't do."""
    rows = rows_of(x)
    out = empty_rows(x.shape[:-1], x.shape[-1], form, group, None, x.device)
    if not len(rows):
        return (), out
    batches = {len(m) for m in (modulation_scale, modulation_shift) if m is not None} or {1}
    if len(batches) > 1 or 0 in batches or len(rows) % min(batches):
        raise ValueError(f"rows are shared out in equal runs; given {len(rows)} rows and modulations for {sorted(batches)} batches")
    bits, top = form_of(form)
    block = power_of_two(x.shape[-1])
    arguments = {
        "x": rows, "codes": out.codes, "scale_out": out.scale, "zero_out": out.zero, "sums": out.sums, "weight": weight, "bias": bias,
        "modulation_scale": None if modulation_scale is None else modulation_scale.contiguous(),
        "modulation_shift": None if modulation_shift is None else modulation_shift.contiguous(),
        "shift": shift, "divisor": divisor, "x_stride": rows.stride(0), "K": x.shape[-1], "per_batch": len(rows) // batches.pop(), "eps": eps,
        "RMS": rms, "BITS": bits, "TOP": top, "GROUP": group, "BLOCK": max(block, group),
    }  # fmt: skip
    return (Launch(_norm_quantize, (len(rows),), arguments, warps=warps_of(block), stages=1),), out
