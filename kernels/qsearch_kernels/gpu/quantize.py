"""An activation function and rounding in one pass: GELU, SiLU, GEGLU or nothing, then codes, scale,
zero and sums of each row.

Unfused, the function writes what rounding reads back: 4 of 7 bytes an element. One program a row; a
row lies whole in registers, so that its range is known before its codes are written and nothing is
read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_a8 import ACTIVATIONS, Rows, form_of
from .launching import Launch, rows_of
from .parts import activated
from .rounding import blocks_of, store_row, taken, warps_of


@triton.jit
def _read(begin, at, K, shift, divisor, KIND: tl.constexpr, MASKED: tl.constexpr):
    y = taken(begin, at, K, 0.0, MASKED)
    if KIND == "geglu":
        y *= activated(taken(begin + K, at, K, 0.0, MASKED), "gelu")
    else:
        y = activated(y, KIND)
    if shift is not None:
        y -= taken(shift, at, K, 0.0, MASKED)
    if divisor is not None:
        y = y / taken(divisor, at, K, 1.0, MASKED)
    return y


@triton.jit
def _quantize(
    x, codes, scale_out, zero_out, sums, shift, divisor, scale, zero, x_stride, K, per_scale,
    KIND: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = x + row.to(tl.int64) * x_stride
    first = _read(begin, tl.arange(0, MAIN), K, shift, divisor, KIND, MASKED)
    if TAIL > 0:
        second = _read(begin, MAIN + tl.arange(0, TAIL), K, shift, divisor, KIND, True)
    else:
        second = first
    store_row(
        first,
        second,
        row,
        K,
        codes,
        scale_out,
        zero_out,
        sums,
        scale,
        zero,
        per_scale,
        BITS,
        TOP,
        GROUP,
        MAIN,
        TAIL,
        MASKED,
    )


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
    """The launches (none where there are no rows) and the rows that they fill:
    `reference_a8.quantize_rows`. Raises `ValueError` for what it can't do.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"an activation is one of {', '.join(repr(a) for a in ACTIVATIONS)}; given "
            f"{activation!r}"
        )
    columns = x.shape[-1] // 2 if activation == "geglu" else x.shape[-1]
    rows = rows_of(x)
    out = empty_rows(
        x.shape[:-1], columns, form, group, None if scale is None else len(scale), x.device
    )
    if not len(rows):
        return (), out
    bits, top = form_of(form)
    arguments = {
        "x": rows, "codes": out.codes, "scale_out": out.scale, "zero_out": out.zero,
        "sums": out.sums, "shift": shift, "divisor": divisor,
        "scale": None if scale is None else scale.contiguous(),
        "zero": (
            None if scale is None
            else torch.zeros_like(scale) if zero is None else zero.contiguous()
        ),
        "x_stride": rows.stride(0), "K": columns,
        "per_scale": len(rows) // len(out.scale), "KIND": activation, "BITS": bits, "TOP": top,
        "GROUP": group,
        **blocks_of(columns, group),
    }  # fmt: skip
    return (Launch(_quantize, (len(rows),), arguments, warps=warps_of(columns), stages=1),), out


def empty_rows(
    shape: torch.Size, columns: int, form: str, group: int, grids: int | None, device: torch.device
) -> Rows:
    """`Rows` to be filled, with `grids` grids (None = one a row). Raises `ValueError` for groups
    that no reshape of a row can show.
    """
    if group and (group < 2 or group & (group - 1)):
        raise ValueError(
            "sums are taken over groups of 2, 4, 8, ... columns, or over the row (0); "
            f"given {group}"
        )
    bits, _ = form_of(form)
    rows = shape.numel()
    if grids is not None and (not grids or rows % grids):
        raise ValueError(f"rows are shared out in equal runs; given {rows} rows and {grids} grids")
    codes = torch.empty(
        *shape, columns, device=device, dtype=torch.int8 if bits else torch.float8_e4m3fn
    )
    scale, zero = (
        torch.empty(rows if grids is None else grids, device=device, dtype=torch.float32)
        for _ in range(2)
    )
    sums = torch.zeros(rows, -(-columns // group) if group else 1, device=device, dtype=torch.int32)
    return Rows(codes, scale, zero, sums)
