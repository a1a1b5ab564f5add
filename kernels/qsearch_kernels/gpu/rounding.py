"""Rounding a row that lies in registers: its range, its grid, its codes and their sums.

A row is taken as two blocks, the largest power of two within it and what is left: 1152 columns are
1024 and 128, where one block would be 2048 and almost half of it idle. The work for an element is
counted in instructions, since at full memory bandwidth an H200 has time for about 30: one
multiplication by the reciprocal of the scale instead of a division, and rounding by adding 1.5 *
2**23, after which the whole number stands in the lowest bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def top_of(first, second, TAIL: tl.constexpr):
    """The largest entry of a row and of zero; NaN where it holds one. Places beyond the row hold
    zeros.
    """
    top = tl.maximum(tl.reduce(first, 0, _larger), 0.0, propagate_nan=tl.PropagateNan.ALL)
    if TAIL > 0:
        top = tl.maximum(top, tl.reduce(second, 0, _larger), propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def taken(pointer, at, K, OTHER: tl.constexpr, MASKED: tl.constexpr):
    """fp32 entries `at` of a row, OTHER beyond K."""
    if MASKED:
        return tl.load(pointer + at, mask=at < K, other=OTHER).to(tl.float32)
    else:
        return tl.load(pointer + at).to(tl.float32)


@triton.jit
def nearest_whole(x):
    """int32: fp32 `x`, smaller than 2**22, rounded to the nearest whole number, halves to even."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def grid_of(low, high, BITS: tl.constexpr, TOP: tl.constexpr):
    """(scale, zero, 0 or NaN) of a row from its ends: `reference_a8.grid_of`, the scale as fp16
    stores it; the last is NaN where the row is not finite.
    """
    poison = (high + low) * 0.0
    low, high = tl.where(poison == 0.0, low, 0.0), tl.where(poison == 0.0, high, 0.0)
    if BITS == 0:
        wide = tl.maximum(high, -low)
        scale = tl.div_rn(wide, TOP)
    else:
        wide = high - low
        scale = tl.div_rn(wide, ((1 << BITS) - 1) * 1.0)
    scale = (
        tl.minimum(tl.maximum(scale, 5.9604644775390625e-08), 65504.0).to(tl.float16).to(tl.float32)
    )
    if BITS == 0:
        zero = 0.0
    else:
        unsigned = tl.minimum(tl.maximum(tl.div_rn(-low, scale), 0.0), ((1 << BITS) - 1) * 1.0)
        zero = nearest_whole(unsigned).to(tl.float32) - (1 << (BITS - 1))
    return scale, zero, poison


@triton.jit
def store_codes(
    y,
    begin,
    at,
    K,
    reciprocal,
    zero,
    sums,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Round fp32 `y` to codes and write them, and the sums of its groups; for a GROUP of 0 the sum
    of all comes back.
    """
    if BITS == 0:
        code = tl.minimum(tl.maximum(y * reciprocal, -TOP), TOP).to(tl.float8e4nv)
    else:
        HALF: tl.constexpr = 1 << (BITS - 1)
        code = nearest_whole(tl.minimum(tl.maximum(y * reciprocal + zero, -HALF * 1.0), HALF - 1.0))
        if MASKED:
            code = tl.where(at < K, code, 0)
    if MASKED:
        tl.store(begin + at, code.to(begin.dtype.element_ty), mask=at < K)
    else:
        tl.store(begin + at, code.to(begin.dtype.element_ty))
    total = 0
    if BITS > 0:
        if GROUP > 0:
            GROUPS: tl.constexpr = y.shape[0] // GROUP
            group = tl.min(at, axis=0) // GROUP + tl.arange(0, GROUPS)
            tl.store(
                sums + group,
                tl.sum(tl.reshape(code, (GROUPS, GROUP)), axis=1),
                mask=group * GROUP < K,
            )
        else:
            total = tl.sum(code, axis=0)
    return total


@triton.jit
def store_row(
    first, second, row, K, codes, scale_out, zero_out, sums, scale, zero, per_scale,
    BITS: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Round a row of fp32 [MAIN] and [TAIL] on its own grid, or on the one that is given, and write
    codes, sums, scale and zero.
    """
    if scale is not None:
        s = tl.load(scale + row // per_scale)
        z = tl.load(zero + row // per_scale)
        at_grid, owner, poison = row // per_scale, row % per_scale == 0, 0.0
    else:
        s, z, poison = grid_of(
            -top_of(-first, -second, TAIL), top_of(first, second, TAIL), BITS, TOP
        )
        at_grid, owner = row, True
    tl.store(scale_out + at_grid, s + poison, mask=owner)
    tl.store(zero_out + at_grid, z, mask=owner)
    begin = codes + row.to(tl.int64) * K
    reciprocal = tl.div_rn(1.0, s)
    groups = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    total = store_codes(
        first,
        begin,
        tl.arange(0, MAIN),
        K,
        reciprocal,
        z,
        sums + row * groups,
        BITS,
        TOP,
        GROUP,
        MASKED,
    )
    if TAIL > 0:
        total += store_codes(
            second,
            begin,
            MAIN + tl.arange(0, TAIL),
            K,
            reciprocal,
            z,
            sums + row * groups,
            BITS,
            TOP,
            GROUP,
            True,
        )
    if BITS > 0 and GROUP == 0:
        tl.store(sums + row, total)


def blocks_of(columns: int, group: int) -> dict[str, int | bool]:
    """The blocks of a row as the kernels' constants: MAIN and TAIL (0 = none), and whether MAIN
    reaches beyond the row (MASKED).
    """
    whole = max(1 << max(0, columns - 1).bit_length(), group, 1)
    main = 1 << max(0, columns.bit_length() - 1)
    tail = max(1 << max(0, columns - main - 1).bit_length(), group)
    if main == columns and main >= group:
        return {"MAIN": main, "TAIL": 0, "MASKED": False}
    if main < max(256, group) or main + tail >= whole:
        return {"MAIN": whole, "TAIL": 0, "MASKED": True}
    return {"MAIN": main, "TAIL": tail, "MASKED": False}


def warps_of(columns: int) -> int:
    """One warp for about 1024 columns: 32 elements a thread are loads enough on their way, and few
    warps wait for each other's part of a sum.
    """
    return min(16, max(1, 1 << max(0, (columns // 1024).bit_length() - 1)))
