"""W8A8: int8 or fp8 rows times int8 or fp8 weights on the tensor cores, with everything that
follows in the epilogue.

A persistent kernel: one program a multiprocessor takes tile after tile, so that the stores of one
overlap the loads of the next. Operands come through tensor descriptors (Hopper's copy engine) where
their rows are whole multiples of 16 bytes, else through pointers. int8 sums are exact in int32; fp8
sums are promoted to fp32 after every tile's depth, at most 128 products, since the tensor cores
keep about 14 bits of a longer one (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Weights of Q, K
and V stacked along N are one launch on one rounded input: the grouped product that attention needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, processors
from .parts import finish, place
from .tiles import FP8_TILES, TILES, Tile, choose


@triton.jit
def _linear_a8(
    a, w, out, a_scale, a_zero, sums, w_scale, w_zero, w_total, bias, gate, residual, M, N, K,
    per_scale, per_gate,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    PROGRAMS: tl.constexpr, INTEGER: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        row_tile, column_tile = place(tile, row_tiles, column_tiles, BAND)
        rows = row_tile * BM + tl.arange(0, BM)
        columns = column_tile * BN + tl.arange(0, BN)
        if INTEGER:
            acc = tl.zeros((BM, BN), tl.int32)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            if DESCRIBED:
                x = a.load([row_tile * BM, k0])
                y = w.load([column_tile * BN, k0])
            else:
                at = k0 + tl.arange(0, BK)
                inside = at[None, :] < K
                x = tl.load(
                    a + rows[:, None].to(tl.int64) * K + at[None, :],
                    mask=(rows < M)[:, None] & inside,
                    other=0.0,
                )
                y = tl.load(
                    w + columns[:, None].to(tl.int64) * K + at[None, :],
                    mask=(columns < N)[:, None] & inside,
                    other=0.0,
                )
            if INTEGER:
                acc = tl.dot(x, y.T, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(x, y.T, acc, max_num_imprecise_acc=BK)
        first = column_tile * BN
        finish(
            acc,
            out,
            rows,
            first,
            M,
            N,
            a_scale,
            a_zero,
            sums,
            w_scale,
            w_zero,
            w_total,
            bias,
            gate,
            residual,
            per_scale,
            per_gate,
            BM,
            BN,
        )


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
    tile: Tile | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches (none where there is nothing to compute) and the output that they fill:
    `reference_a8.linear_a8`. Raises `ValueError` for shapes that don't fit.
    """
    rows, columns = codes.shape[:-1].numel(), codes.shape[-1]
    if (
        weight.shape[1:] != (columns,)
        or weight.dtype != codes.dtype
        or codes.dtype not in (torch.int8, torch.float8_e4m3fn)
    ):
        raise ValueError(
            f"int8 (or e4m3) rows of {columns} need weights [N, {columns}] of their type; "
            f"given {codes.dtype} and {weight.dtype} of shape {tuple(weight.shape)}"
        )
    N = weight.shape[0]
    out = torch.empty(*codes.shape[:-1], N, device=codes.device, dtype=dtype)
    if not out.numel():
        return (), out
    integer = codes.dtype == torch.int8
    tile = tile or choose(
        f"linear_a8 {codes.dtype}",
        rows,
        N,
        columns,
        processors(codes),
        TILES if integer else FP8_TILES,
    )
    programs = min(processors(codes), -(-rows // tile.m) * -(-N // tile.n))
    a, w, described = operands(codes.reshape(rows, columns).contiguous(), weight.contiguous(), tile)
    arguments = {
        "a": a, "w": w, "out": out,
        **epilogue_arguments(
            rows, N, 1, a_scale, a_zero, sums, w_scale, w_zero, w_total, bias, gate, residual
        ),
        "M": rows, "N": N, "K": columns, "BM": tile.m, "BN": tile.n, "BK": tile.k, "BAND": 8,
        "PROGRAMS": programs,
        "INTEGER": integer, "DESCRIBED": described,
    }  # fmt: skip
    return (Launch(_linear_a8, (programs,), arguments, tile.warps, tile.stages),), out


def operands(a: Tensor, w: Tensor, tile: Tile) -> tuple[Any, Any, bool]:
    """(rows, weights, True) as tensor descriptors where the copy engine takes them, else as they
    are and False.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if a.shape[-1] == 0 or any(
        (t.shape[-1] * t.element_size()) % 16 or (t.device.type != "meta" and t.data_ptr() % 16)
        for t in (a, w)
    ):
        return a, w, False
    return (
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w, [tile.n, tile.k]),
        True,
    )


def epilogue_arguments(
    rows: int,
    columns: int,
    groups: int,
    a_scale: Tensor,
    a_zero: Tensor | None,
    sums: Tensor | None,
    w_scale: Tensor,
    w_zero: Tensor | None,
    w_total: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> dict[str, Any]:
    """What `parts.finish` reads, checked, by its arguments' names. Raises `ValueError` with the
    shape that fits.
    """
    if a_zero is not None and w_total is None:
        raise ValueError("rows with zeros need w_total, the sum of each row of weights; given none")
    if w_zero is not None and sums is None:
        raise ValueError("weights with zeros need sums, those of each row's codes; given none")
    runs, batches = len(a_scale), len(gate) if gate is not None else 1
    if not runs or rows % runs or not batches or rows % batches:
        raise ValueError(
            f"rows are shared out in equal runs; given {rows} rows, {runs} scales and "
            f"{batches} gates"
        )
    wide: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "a_zero": (a_zero, (runs,)), "sums": (sums if w_zero is not None else None, (rows, groups)),
        "w_total": (w_total, (columns,)), "bias": (bias, (columns,)),
        "gate": (gate, (batches, columns)), "w_scale": (w_scale, (columns, groups)),
        "w_zero": (w_zero, (columns, groups)),
    }  # fmt: skip
    for name, (value, shape) in wide.items():
        if value is not None and value.numel() != torch.Size(shape).numel():
            raise ValueError(
                f"{rows} x {columns} outputs need {name} of shape {shape}; given "
                f"{tuple(value.shape)}"
            )
    if residual is not None and residual.numel() != rows * columns:
        raise ValueError(
            f"{rows} x {columns} outputs need a residual of that shape; given "
            f"{tuple(residual.shape)}"
        )
    found = {
        name: None if value is None else value.contiguous() for name, (value, _) in wide.items()
    }
    rest = {
        "a_scale": a_scale.contiguous(),
        "residual": None if residual is None else residual.contiguous(),
    }
    return {**found, **rest, "per_scale": rows // runs, "per_gate": rows // batches}
