"""Weight-only product for at most 16 rows (time and pooled-text embeddings, adaLN): bound by
reading the weights, so they are read packed.

Split along K: where the output has few columns, several programs share one, each with its part of
the sum, and a second kernel adds the parts up in a fixed order (no atomics, so that a result is the
same every time). Levels go to the tensor cores in the activations' type, where whole numbers of up
to 8 bits and every small float are exact; scales are applied to fp32 sums. Only codebooks are
rounded to it, as a 16-bit weight would be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_levels import MOST_ROWS, check_weight, table_of, takes
from .launching import Launch, interpreting, processors, rows_of
from .parts import codes_at, levels_at


@triton.jit
def _partial(
    x, packed, scale, zero, table, partial, offset, M, N, K, x_stride, bytes_a_row, groups,
    table_stride, span,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, EXACT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, 16)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    column_mask = columns < N
    begin = tl.program_id(1) * span
    acc = tl.zeros((16, BN), tl.float32)
    for k0 in range(begin, tl.minimum(begin + span, K), BK):
        at = k0 + tl.arange(0, BK)
        a = tl.load(
            x + rows[:, None] * x_stride + at[None, :],
            mask=(rows < M)[:, None] & (at < K)[None, :],
            other=0.0,
        )
        codes = codes_at(packed, columns, column_mask, bytes_a_row, k0, K, BITS, BN, BK)
        if table is not None:
            level = levels_at(codes, table, columns, column_mask, table_stride, k0, K, 0, BITS)
        else:
            level = codes.to(tl.float32)
        if EXACT:
            part = tl.dot(a.to(tl.float32), level.T, input_precision="ieee")
        else:
            part = tl.dot(a, level.to(a.dtype).T)
        sum_a = tl.sum(a.to(tl.float32), axis=1)[:, None]
        group = columns * (groups * ROW) + (k0 // GROUP if GROUP > 0 else 0)
        if zero is not None:
            part -= (
                sum_a * tl.load(zero + group, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            )
        part -= sum_a * offset
        acc += part * tl.load(scale + group, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out = (tl.program_id(1) * M + rows)[:, None] * N + columns[None, :]
    tl.store(partial + out, acc, mask=(rows < M)[:, None] & column_mask[None, :])


@triton.jit
def _add_up(partial, bias, out, MN, N, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(partial + part * MN + at, mask=mask, other=0.0)
    if bias is not None:
        y += tl.load(bias + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def linear_wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    levels: Tensor | None,
    bits: int,
    columns: int,
    group: int,
    bias: Tensor | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches (none where there is nothing to compute) and the output [..., rows] that they
    fill: `reference_levels.linear_levels`.

    Raises `ValueError` where `takes` says no, and for shapes that don't fit.
    """
    a, N, groups = rows_of(x), packed.shape[0], -(-columns // group) if group > 0 else 1
    if not takes(len(a), group, levels):
        raise ValueError(
            f"up to {MOST_ROWS} rows, groups of 16, 32, 64, ... columns or whole rows, "
            "and codebooks of whole rows are multiplied packed; "
            f"given {len(a)} rows in groups of {group}: dequantize instead"
        )
    check_weight(packed, scale, zero, bits, columns, group)
    if x.shape[-1] != columns:
        raise ValueError(
            f"a weight of {columns} columns takes rows of as many entries; given {tuple(x.shape)}"
        )
    table = table_of(levels, N, 1, bits)
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    if not out.numel():
        return (), out
    depth, width = min(group if group > 0 else 128, 128), 32
    parts = min(16, max(1, 2 * processors(x) // -(-N // width)), -(-columns // depth))
    span = -(-columns // (parts * depth)) * depth
    partial = torch.empty(parts, len(a), N, device=x.device, dtype=torch.float32)
    arguments = {
        "x": a, "packed": packed.contiguous(), "scale": scale.contiguous(),
        "zero": None if zero is None else zero.contiguous(),
        "table": None if table is None else table.contiguous(), "partial": partial,
        "offset": offset - 128.0 if packed.dtype == torch.int8 else offset,
        "M": len(a), "N": N, "K": columns, "x_stride": a.stride(0), "bytes_a_row": packed.shape[1],
        "groups": groups,
        "table_stride": 0 if table is None or len(table) == 1 else 2**bits, "span": span,
        "BITS": bits, "GROUP": group, "ROW": int(group >= 0),
        "EXACT": x.dtype == torch.float32 or interpreting(), "BN": width, "BK": depth,
    }  # fmt: skip
    adding = {
        "partial": partial,
        "bias": bias,
        "out": out,
        "MN": out.numel(),
        "N": N,
        "PARTS": parts,
        "BLOCK": 256,
    }
    return (
        Launch(_partial, (-(-N // width), parts), arguments, 4, 4),
        Launch(_add_up, (-(-out.numel() // 256),), adding, 4, 1),
    ), out
