"""What is done to rows around an integer product, as numba compiles it for a CPU: a pass where
torch's own operations take four or five.

The twins in plain torch are in `cpu_rows.py` and `cpu_rounded.py`. Numbers stay in 32 bits by
explicit casts, and loops run over contiguous rows, so that LLVM makes vector instructions of them.
"""

from __future__ import annotations

import numpy as np

from .floats_numba import load, store
from .jit import jit

_int, _float = np.int32, np.float32
_zero, _one = np.float32(0), np.int32(1)
_MAGNITUDE, _INFINITE = np.int32(0x7FFFFFFF), np.float32(np.inf)
#: of fp16: the least scale and the greatest, and below which numbers have fewer digits
_LEAST, _MOST, _NORMAL = np.float32(2**-24), np.float32(65504), np.float32(2**-14)
_SUBNORMAL = np.float32(2**24)
_CUT, _HALF, _DIGITS = np.int32(13), np.int32(0xFFF), np.int32(~0x1FFF)


@jit
def _ordered(bits):
    """The bits of an fp32 number as an int32 of the same order; its own inverse."""
    return _int(bits ^ _int(_int(bits >> _int(31)) & _MAGNITUDE))


@jit
def ends_of(row, ends):
    """The least and the greatest number of `row` fp32 to `ends`; a NaN is beyond all numbers."""
    bits, width = row.view(_int), len(row)
    least, most = _ordered(bits[0]), _ordered(bits[0])
    for k in range(width):
        number = _ordered(bits[k])
        least, most = min(least, number), max(most, number)
    found = ends.view(_int)
    found[0], found[1] = _ordered(least), _ordered(most)


@jit
def _round_to_fp16(numbers):
    """`reference.as_fp16` of positive numbers below the greatest of fp16, in place."""
    bits = numbers.view(_int)
    for k in range(len(numbers)):
        if numbers[k] < _NORMAL:
            numbers[k] = np.rint(numbers[k] * _SUBNORMAL) / _SUBNORMAL
        else:
            odd = _int(_int(bits[k] >> _CUT) & _one)
            bits[k] = _int(_int(bits[k] + _int(_HALF + odd)) & _DIGITS)


@jit
def round_rows(x, short, low, high, top, less, codes, scale, zero, sums):
    """Rows `x` [M, K] rounded on the grid of `reference.grid`, each while it is in the first cache.

    `x` is int16, of bf16 where `short`, else of fp32. `low`, `high` fp32 are the ends of one grid
    or of M, or empty for each row's own. `codes` int8 or uint8 [M, K] become `less` less than they
    are, `sums` [M] their sums, `scale` and `zero` [M] the grids; a row that holds something not
    finite has the scale NaN.
    """
    ends, unit = np.empty(2, _float), np.empty(1, _float)
    rows = np.empty((1, codes.shape[1]), _float) if short else x.view(_float)
    top, less, one = _float(top), _int(less), codes.dtype.type
    width = codes.shape[1]
    for m in range(len(x)):
        row = rows[0 if short else m]
        if short:
            load(x[m], short, row)
        ends_of(row, ends)
        finite = ends[0] > -_INFINITE and ends[1] < _INFINITE
        least = low[min(m, len(low) - 1)] if len(low) else ends[0]
        most = high[min(m, len(high) - 1)] if len(high) else ends[1]
        least, most = min(least, _zero), max(most, _zero)
        unit[0] = min(max(_float(most - least) / top, _LEAST), _MOST)
        _round_to_fp16(unit)
        origin = min(max(np.rint(-least / unit[0]), _zero), top)
        grid, total = unit[0], _int(0)
        for k in range(width):
            place = np.rint(row[k] / grid + origin)
            place = place if place > _zero else _zero  # of a NaN too
            place = place if place < top else top
            code = _int(_int(place) - less)
            total += code
            codes[m, k] = one(code)
        sums[m] = total
        scale[m] = grid if finite else _float(np.nan)
        zero[m] = origin - _float(less)


@jit
def rounded(x, short, low, high, top, columns, uneven):
    """Rows `x` [M, `columns`] as unsigned bytes (`round_rows`), and what `finish` takes of them:
    codes [M, columns], `first`, `second` (empty where the weight is not `uneven`), `a_scale` [M].
    """
    count = len(x)
    codes, sums = np.empty((count, columns), np.uint8), np.empty(count, _int)
    a_scale, first = np.empty(count, _float), np.empty(count, _float)
    round_rows(x, short, low, high, top, 0, codes, a_scale, first, sums)
    second = np.empty(count if uneven else 0, _float)
    for m in range(count):
        first[m] = -first[m]
    for m in range(len(second)):
        second[m] = -_float(columns) * first[m] - _float(sums[m])
    return codes, first, second, a_scale


@jit
def finish(sums, first, total, second, zero, w_scale, a_scale, bias, short, out, begin):
    """`out[:, begin:]` = (sums + first * total + second * zero) * w_scale * a_scale + bias.

    `sums` int32 or fp32 [M, N]; `first`, `second`, `a_scale` [M]; `total`, `zero`, `w_scale`,
    `bias` [N]. An empty `second` or `bias` stands for zeros. `out` is int16, of bf16 where `short`,
    else of fp32.
    """
    uneven, biased, wide = len(second) > 0, len(bias) > 0, sums.shape[1]
    lines = np.empty((1, begin + wide), _float) if short else out.view(_float)
    for m in range(len(sums)):
        row, left, unit = sums[m], first[m], a_scale[m]
        line = lines[0 if short else m, begin : begin + wide]
        if uneven:
            more = second[m]
            for n in range(wide):
                number = _float(row[n]) + left * total[n] + more * zero[n]
                line[n] = number * w_scale[n] * unit
        else:
            for n in range(wide):
                line[n] = (_float(row[n]) + left * total[n]) * w_scale[n] * unit
        if biased:
            for n in range(wide):
                line[n] += bias[n]
        if short:
            store(line, short, out[m, begin : begin + wide])
