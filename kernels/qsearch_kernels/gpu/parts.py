"""What several kernels share: unpacking codes, looking up levels, activation functions, the
epilogue of an integer product.

Arithmetic is in fp32 from the load on: on bf16 Triton's interpreter is wrong without a word (triton
issue 11584), and the GPU would round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand(packed, WIDTH: tl.constexpr, FIRST: tl.constexpr = 0, STEP: tl.constexpr = 1):
    """Bytes [rows, bytes] -> codes uint8 [rows, bytes, 2, ..., 2] of `WIDTH` bits each, the lowest
    bits first; with STEP = 1, all of them in order.
    """
    if STEP * WIDTH == 8:
        return (packed >> (FIRST * WIDTH)) & ((1 << WIDTH) - 1)
    else:
        even = expand(packed, WIDTH, FIRST, STEP * 2)
        odd = expand(packed, WIDTH, FIRST + STEP, STEP * 2)
        return tl.join(even, odd)


@triton.jit
def plane(
    packed,
    rows,
    row_mask,
    row_bytes,
    first_byte,
    k0,
    K,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Codes uint8 [BN, BK] of one plane of `WIDTH` bits that begins at `first_byte` of each row;
    zeros beyond K.
    """
    BYTES: tl.constexpr = BK * WIDTH // 8
    byte = k0 * WIDTH // 8 + tl.arange(0, BYTES)
    mask = row_mask[:, None] & (byte[None, :] < (K * WIDTH + 7) // 8)
    found = tl.load(
        packed + rows[:, None] * row_bytes + first_byte + byte[None, :], mask=mask, other=0
    )
    if WIDTH == 8:
        return found
    else:
        return tl.reshape(expand(found, WIDTH), (BN, BK))


@triton.jit
def codes_at(
    packed, rows, row_mask, row_bytes, k0, K, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Codes uint8 [BN, BK] of `rows` from column k0 on, a multiple of 8, in the layout of
    `layout.py`, or int8 where they lie so.
    """
    if BITS == 8 or BITS == 4 or BITS == 2 or BITS == 1:
        return plane(packed, rows, row_mask, row_bytes, 0, k0, K, BITS, BN, BK)
    else:
        WIDE: tl.constexpr = 4 if BITS > 4 else 2
        REST: tl.constexpr = BITS - WIDE
        low = plane(packed, rows, row_mask, row_bytes, 0, k0, K, WIDE, BN, BK)
        start = (K * WIDE + 7) // 8
        if REST == 3:
            middle = plane(packed, rows, row_mask, row_bytes, start, k0, K, 2, BN, BK)
            high = plane(
                packed, rows, row_mask, row_bytes, start + (K * 2 + 7) // 8, k0, K, 1, BN, BK
            )
            return low | (middle << 4) | (high << 6)
        else:
            return low | (
                plane(packed, rows, row_mask, row_bytes, start, k0, K, REST, BN, BK) << WIDE
            )


@triton.jit
def spread(values, rows, row_mask, groups, k0, K, GROUP: tl.constexpr, BK: tl.constexpr):
    """fp32 [BN, 1] where one group covers the tile, else [BN, BK]: the scale (or zero) of each
    weight from values [rows, groups].

    GROUP: as in `reference.dequantize`: neighbours of a row that share one, 0 = the whole row, -1 =
        the whole weight.
    """
    if GROUP == -1:
        return tl.load(values + rows * 0, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    elif GROUP == 0:
        return tl.load(values + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    elif GROUP % BK == 0:
        return tl.load(values + rows * groups + k0 // GROUP, mask=row_mask, other=0.0).to(
            tl.float32
        )[:, None]
    elif BK % GROUP == 0:
        PARTS: tl.constexpr = BK // GROUP
        group = k0 // GROUP + tl.arange(0, PARTS)
        found = tl.load(
            values + rows[:, None] * groups + group[None, :],
            mask=row_mask[:, None] & (group < groups)[None, :],
            other=0.0,
        ).to(tl.float32)
        return tl.reshape(
            tl.broadcast_to(found[:, :, None], (rows.shape[0], PARTS, GROUP)), (rows.shape[0], BK)
        )
    else:
        column = k0 + tl.arange(0, BK)
        mask = row_mask[:, None] & (column < K)[None, :]
        return tl.load(
            values + rows[:, None] * groups + (column // GROUP)[None, :], mask=mask, other=0.0
        ).to(tl.float32)


@triton.jit
def levels_at(
    codes, table, rows, row_mask, table_stride, k0, K, GROUP: tl.constexpr, BITS: tl.constexpr
):
    """fp32 [BN, BK]: the entry of each row's table [2**BITS] that a code names (`table_stride`
    entries from row to row, 0 = one for all).

    GROUP: columns that share a table, the tables of a row one after another; 0 = a table serves the
        row.
    """
    if GROUP == 0 and BITS <= 4:  # the row's table stays in registers and shared memory
        entries = tl.load(
            table + rows[:, None] * table_stride + tl.arange(0, 1 << BITS)[None, :],
            mask=row_mask[:, None],
            other=0.0,
        )
        return tl.gather(entries, codes.to(tl.int32), 1).to(tl.float32)
    at = rows[:, None] * table_stride + codes.to(tl.int32)
    mask = row_mask[:, None]
    if GROUP > 0:
        column = k0 + tl.arange(0, codes.shape[1])
        at += (column // GROUP)[None, :] * (1 << BITS)
        mask = mask & (column < K)[None, :]
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """fp32 `x` after the activation function that KIND names: "", "gelu", "gelu-tanh" or "silu"."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu-tanh":
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * (
            1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0)
        )  # x (1 + tanh u) / 2, and no overflow hurts
    elif KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        return x


@triton.jit
def finish(
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
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write an integer product `acc` [BM, BN] with scales, zeros, bias, gate and residual, as in
    `reference_a8.linear_a8`; what is None is left out.

    `first`: the first column. Halves of the columns one after the other where the tile is wide:
    fp32 values of all of it would spill registers.
    """
    if BM * BN > 8192:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        finish(
            left,
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
            BN // 2,
        )
        finish(
            right,
            out,
            rows,
            first + BN // 2,
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
            BN // 2,
        )
    else:
        columns = first + tl.arange(0, BN)
        row_mask, column_mask = rows < M, columns < N
        y = acc.to(tl.float32)
        if w_zero is not None:
            sum_a = tl.load(sums + rows, mask=row_mask, other=0).to(tl.float32)
            y -= sum_a[:, None] * tl.load(w_zero + columns, mask=column_mask, other=0.0)[None, :]
        if w_scale is not None:
            y *= tl.load(w_scale + columns, mask=column_mask, other=0.0)[None, :]
        if a_zero is not None:
            zero = tl.load(a_zero + rows // per_scale, mask=row_mask, other=0.0)
            y -= zero[:, None] * tl.load(w_total + columns, mask=column_mask, other=0.0)[None, :]
        y *= tl.load(a_scale + rows // per_scale, mask=row_mask, other=0.0)[:, None]
        if bias is not None:
            y += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        if gate is not None:
            y *= tl.load(
                gate + (rows // per_gate)[:, None] * N + columns[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        at = rows[:, None].to(tl.int64) * N + columns[None, :]
        if residual is not None:
            y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def place(tile, row_tiles, column_tiles, BAND: tl.constexpr):
    """(row tile, column tile) of the tile-th tile: BAND row tiles together, column after column, so
    that what they read stays in the L2 cache.
    """
    in_band = BAND * column_tiles
    first = tile // in_band * BAND
    height = tl.minimum(row_tiles - first, BAND)
    return first + tile % in_band % height, tile % in_band // height
