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
    bits = row.view(_int)
    least, most = _ordered(bits[0]), _ordered(bits[0])
    for k in range(len(bits)):
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
def _round(row, unit, origin, top, less, codes):
    """The codes of a row, `less` less than they are; their sum."""
    one, total = codes.dtype.type, _int(0)
    for k in range(len(row)):
        place = np.rint(row[k] / unit + origin)
        place = place if place > _zero else _zero  # of a NaN too
        place = place if place < top else top
        code = _int(_int(place) - less)
        total += code
        codes[k] = one(code)
    return total


@jit
def round_rows(x, short, low, high, top, less, codes, scale, zero, sums):
    """Rows `x` [M, K] rounded on the grid of `reference.grid`, each while it is in the first cache.

    `x` is int16, of bf16 where `short`, else of fp32. `low`, `high` fp32 are the ends of one grid
    or of M, or empty for each row's own. `codes` int8 or uint8 [M, K] become `less` less than they
    are, `sums` [M] their sums, `scale` and `zero` [M] the grids; a row that holds something not
    finite has the scale NaN.
    """
    line, ends, unit = np.empty(codes.shape[1], _float), np.empty(2, _float), np.empty(1, _float)
    top, less = _float(top), _int(less)
    for m in range(len(x)):
        load(x[m], short, line)
        ends_of(line, ends)
        finite = ends[0] > -_INFINITE and ends[1] < _INFINITE
        least = low[min(m, len(low) - 1)] if len(low) else ends[0]
        most = high[min(m, len(high) - 1)] if len(high) else ends[1]
        least, most = min(least, _zero), max(most, _zero)
        unit[0] = min(max(_float(most - least) / top, _LEAST), _MOST)
        _round_to_fp16(unit)
        origin = min(max(np.rint(-least / unit[0]), _zero), top)
        sums[m] = _round(line, unit[0], origin, top, less, codes[m])
        scale[m] = unit[0] if finite else _float(np.nan)
        zero[m] = origin - _float(less)


@jit
def finish(sums, first, total, second, zero, w_scale, a_scale, bias, short, out, begin):
    """`out[:, begin:]` = (sums + first * total + second * zero) * w_scale * a_scale + bias.

    `sums` int32 or fp32 [M, N]; `first`, `second`, `a_scale` [M]; `total`, `zero`, `w_scale`,
    `bias` [N]. An empty `second` or `bias` stands for zeros. `out` is int16, of bf16 where `short`,
    else of fp32.
    """
    uneven, biased = len(second) > 0, len(bias) > 0
    size, line = 1 if short else 2, np.empty(sums.shape[1], _float)
    places = slice(size * begin, size * (begin + len(line)))
    for m in range(len(sums)):
        row, left, unit = sums[m], first[m], a_scale[m]
        if uneven:
            more = second[m]
            for n in range(len(row)):
                number = _float(row[n]) + left * total[n] + more * zero[n]
                line[n] = number * w_scale[n] * unit
        else:
            for n in range(len(row)):
                line[n] = (_float(row[n]) + left * total[n]) * w_scale[n] * unit
        if biased:
            for n in range(len(row)):
                line[n] += bias[n]
        store(line, short, out[m, places])
