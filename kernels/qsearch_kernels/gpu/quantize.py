"""An activation function and rounding in one pass: GELU, SiLU, GEGLU or nothing, then codes, scale, zero and sums of each row.

Unfused, the function writes what rounding reads back: 4 of 7 bytes an element. One program a row; a row lies whole in registers, so that its
range is known before its codes are written and nothing is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_a8 import ACTIVATIONS, Rows, form_of
from .launching import Launch, power_of_two, rows_of
from .parts import activated, on_grid, rounded_row


@triton.jit
def store_row(y, row, at, mask, codes, scale_out, zero_out, sums, scale, zero, per_scale, K, BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Round one row of fp32 `y` and write its codes, its sums and, unless its grid is given, its scale and zero."""
    if scale is not None:
        s = tl.load(scale + row // per_scale)
        z = tl.load(zero + row // per_scale)
        if row % per_scale == 0:
            tl.store(scale_out + row // per_scale, s)
            tl.store(zero_out + row // per_scale, z)
        code = on_grid(y, s, z, BITS, TOP)
    else:
        code, s, z = rounded_row(y, mask, BITS, TOP)
        tl.store(scale_out + row, s + tl.sum(tl.where(mask, y * 0.0, 0.0), axis=0))  # not finite: NaN
        tl.store(zero_out + row, z)
    code = tl.where(mask, code, 0.0)
    if BITS == 0:
        tl.store(codes + row.to(tl.int64) * K + at, code.to(tl.float8e4nv), mask=mask)
    else:
        whole = code.to(tl.int32)
        tl.store(codes + row.to(tl.int64) * K + at, whole.to(tl.int8), mask=mask)
        if GROUP == 0:
            tl.store(sums + row, tl.sum(whole, axis=0))
        else:
            GROUPS: tl.constexpr = BLOCK // GROUP
            found = tl.arange(0, GROUPS)
            groups = (K + GROUP - 1) // GROUP
            tl.store(sums + row * groups + found, tl.sum(tl.reshape(whole, (GROUPS, GROUP)), axis=1), mask=found < groups)


@triton.jit
def _quantize(
    x, codes, scale_out, zero_out, sums, shift, divisor, scale, zero, x_stride, K, per_scale,
    KIND: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < K
    begin = x + row.to(tl.int64) * x_stride
    y = tl.load(begin + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == "geglu":
        y *= activated(tl.load(begin + K + at, mask=mask, other=0.0).to(tl.float32), "gelu")
    else:
        y = activated(y, KIND)
    if shift is not None:
        y -= tl.load(shift + at, mask=mask, other=0.0)
    if divisor is not None:
        y = tl.div_rn(y, tl.load(divisor + at, mask=mask, other=1.0))
    store_row(y, row, at, mask, codes, scale_out, zero_out, sums, scale, zero, per_scale, K, BITS, TOP, GROUP, BLOCK)


def quantize_rows(
    x: Tensor,
    form: str = "8",
    activation: str = "",
    shift: Tensor | None = None,
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> tuple[tuple[Launch, ...], Rows]:
    """The launches (none where there are no rows) and the rows that they fill: `reference_a8.quantize_rows`. Raises `ValueError` for what it can't do."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"an activation is one of {', '.join(repr(a) for a in ACTIVATIONS)}; given {activation!r}")
    columns = x.shape[-1] // 2 if activation == "geglu" else x.shape[-1]
    rows = rows_of(x)
    out = empty_rows(x.shape[:-1], columns, form, group, None if scale is None else len(scale), x.device)
    if not len(rows):
        return (), out
    bits, top = form_of(form)
    block = power_of_two(columns)
    arguments = {
        "x": rows, "codes": out.codes, "scale_out": out.scale, "zero_out": out.zero, "sums": out.sums, "shift": shift, "divisor": divisor,
        "scale": None if scale is None else scale.contiguous(), "zero": None if scale is None else torch.zeros_like(scale) if zero is None else zero.contiguous(), "x_stride": rows.stride(0), "K": columns,
        "per_scale": len(rows) // len(out.scale), "KIND": activation, "BITS": bits, "TOP": top, "GROUP": group, "BLOCK": max(block, group),
    }  # fmt: skip
    return (Launch(_quantize, (len(rows),), arguments, warps=warps_of(block), stages=1),), out


def warps_of(block: int) -> int:
    """Warps for a row of `block` columns: about 16 elements a thread, so that loads are wide and nothing is spilled."""
    return min(16, max(1, block // 512))


def empty_rows(shape: torch.Size, columns: int, form: str, group: int, grids: int | None, device: torch.device) -> Rows:
    """`Rows` to be filled, with `grids` grids (None = one a row). Raises `ValueError` for groups that no reshape of a row can show."""
    if group and (group < 2 or group & (group - 1)):
        raise ValueError(f"sums are taken over groups of 2, 4, 8, ... columns, or over the row (0); given {group}")
    bits, _ = form_of(form)
    rows = shape.numel()
    if grids is not None and (not grids or rows % grids):
        raise ValueError(f"rows are shared out in equal runs; given {rows} rows and {grids} grids")
    codes = torch.empty(*shape, columns, device=device, dtype=torch.int8 if bits else torch.float8_e4m3fn)
    scale, zero = (torch.empty(rows if grids is None else grids, device=device, dtype=torch.float32) for _ in range(2))
    sums = torch.zeros(rows, -(-columns // group) if group else 1, device=device, dtype=torch.int32)
    return Rows(codes, scale, zero, sums)
