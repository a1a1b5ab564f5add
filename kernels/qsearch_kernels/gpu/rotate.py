"""Regular Hadamard rotation of rows, alone or with rounding in the same pass: see `hadamard.py`.

One program a row, which lies whole in registers, as in `quantize.py`. For each base-4 digit of a
channel's index in its group, y = sum over the digit / 2 - x; that is the rotation read backwards,
and a group is read backwards by an exclusive or of the index. An activation function may come
before, and the division by smoothing's scales: inputs are smoothed, then rotated, then rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..hadamard import check
from ..reference_a8 import ACTIVATIONS, Rows, form_of
from .launching import Launch, rows_of
from .parts import activated
from .quantize import empty_rows
from .rounding import blocks_of, store_row, taken, warps_of


@triton.jit
def _turned(x, ROTATED: tl.constexpr):
    """fp32 [n]: every ROTATED neighbours, which were read backwards, rotated."""
    SIZE: tl.constexpr = x.shape[0]
    y = tl.reshape(x, (SIZE // 4, 4, 1))
    y = tl.sum(y, 1, keep_dims=True) * 0.5 - y
    if ROTATED >= 16:
        y = tl.reshape(y, (SIZE // 16, 4, 4))
        y = tl.sum(y, 1, keep_dims=True) * 0.5 - y
    if ROTATED >= 64:
        y = tl.reshape(y, (SIZE // 64, 4, 16))
        y = tl.sum(y, 1, keep_dims=True) * 0.5 - y
    if ROTATED >= 256:
        y = tl.reshape(y, (SIZE // 256, 4, 64))
        y = tl.sum(y, 1, keep_dims=True) * 0.5 - y
    return tl.reshape(y, (SIZE,))


@triton.jit
def _read(begin, at, K, divisor, KIND: tl.constexpr, ROTATED: tl.constexpr, MASKED: tl.constexpr):
    back = at ^ (ROTATED - 1)
    y = taken(begin, back, K, 0.0, MASKED)
    if KIND == "geglu":
        y *= activated(taken(begin + K, back, K, 0.0, MASKED), "gelu")
    else:
        y = activated(y, KIND)
    if divisor is not None:
        y = y / taken(divisor, back, K, 1.0, MASKED)
    return _turned(y, ROTATED)


@triton.jit
def _rotate_quantize(
    x, codes, scale_out, zero_out, sums, divisor, scale, zero, x_stride, K, per_scale,
    KIND: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr,
    ROTATED: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = x + row.to(tl.int64) * x_stride
    first = _read(begin, tl.arange(0, MAIN), K, divisor, KIND, ROTATED, MASKED)
    if TAIL > 0:
        second = _read(begin, MAIN + tl.arange(0, TAIL), K, divisor, KIND, ROTATED, True)
    else:
        second = first
    store_row(
        first, second, row, K, codes, scale_out, zero_out, sums, scale, zero, per_scale,
        BITS, TOP, GROUP, MAIN, TAIL, MASKED,
    )  # fmt: skip


@triton.jit
def _rotate(
    x, out, divisor, x_stride, K, KIND: tl.constexpr, ROTATED: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = x + row.to(tl.int64) * x_stride
    line = out + row.to(tl.int64) * K
    at = tl.arange(0, MAIN)
    y = _read(begin, at, K, divisor, KIND, ROTATED, MASKED).to(out.dtype.element_ty)
    if MASKED:
        tl.store(line + at, y, mask=at < K)
    else:
        tl.store(line + at, y)
    if TAIL > 0:
        at = MAIN + tl.arange(0, TAIL)
        y = _read(begin, at, K, divisor, KIND, ROTATED, True).to(out.dtype.element_ty)
        tl.store(line + at, y, mask=at < K)


def rotate_quantize_rows(
    x: Tensor,
    rotated: int,
    form: str = "8",
    activation: str = "",
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> tuple[tuple[Launch, ...], Rows]:
    """The launches and the rows that they fill: `hadamard.rotate_quantize_rows`.

    Raises `ValueError` for what it can't do.
    """
    rows, columns = _checked(x, rotated, activation)
    out = empty_rows(
        x.shape[:-1], columns, form, group, None if scale is None else len(scale), x.device
    )
    if not len(rows):
        return (), out
    bits, top = form_of(form)
    own = None
    if scale is not None:
        own = torch.zeros_like(scale) if zero is None else zero.contiguous()
    arguments = {
        "x": rows, "codes": out.codes, "scale_out": out.scale, "zero_out": out.zero,
        "sums": out.sums,
        "divisor": divisor, "scale": None if scale is None else scale.contiguous(), "zero": own,
        "x_stride": rows.stride(0), "K": columns, "per_scale": len(rows) // len(out.scale),
        "KIND": activation, "BITS": bits, "TOP": top, "GROUP": group, "ROTATED": rotated,
        **blocks_of(columns, max(group, rotated)),
    }  # fmt: skip
    return (Launch(_rotate_quantize, (len(rows),), arguments, warps_of(columns), 1),), out


def rotate(
    x: Tensor, rotated: int, activation: str = "", divisor: Tensor | None = None
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches and the rows that they fill, in the type of `x`: `hadamard.rotate_slow`.

    Raises `ValueError` for what it can't do.
    """
    rows, columns = _checked(x, rotated, activation)
    out = torch.empty(*x.shape[:-1], columns, device=x.device, dtype=x.dtype)
    if not len(rows):
        return (), out
    arguments = {
        "x": rows, "out": out, "divisor": divisor, "x_stride": rows.stride(0), "K": columns,
        "KIND": activation, "ROTATED": rotated, **blocks_of(columns, rotated),
    }  # fmt: skip
    return (Launch(_rotate, (len(rows),), arguments, warps_of(columns), 1),), out


def _checked(x: Tensor, rotated: int, activation: str) -> tuple[Tensor, int]:
    if activation not in ACTIVATIONS:
        given = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"an activation is one of {given}; given {activation!r}")
    columns = x.shape[-1] // 2 if activation == "geglu" else x.shape[-1]
    check(rotated, columns)
    return rows_of(x), columns
