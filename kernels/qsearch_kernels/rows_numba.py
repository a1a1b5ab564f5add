"""What is done to rows around an integer product, as numba compiles it for a CPU: a pass where
torch's own operations take four or five.

The twins in plain torch are in `cpu_rounded.py`. Numbers stay in 32 bits by explicit casts, and
loops run over contiguous rows, so that LLVM makes vector instructions of them.
"""

from __future__ import annotations

import numpy as np

from .jit import jit

_int, _zero = np.int32, np.float32(0)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@jit
def _ordered(bits):
    """The bits of an fp32 number as an int32 of the same order; its own inverse."""
    return _int(bits ^ _int(_int(bits >> _int(31)) & _MAGNITUDE))


@jit
def ends(bits, low, high):
    """Least and greatest number of each row of `bits` int32 [M, K], the bits of fp32 numbers.

    `low`, `high` int32 [M] are their bits again. A NaN is greater than all numbers, or less.
    """
    for m in range(len(bits)):
        row = bits[m]
        least, most = _ordered(row[0]), _ordered(row[0])
        for k in range(len(row)):
            number = _ordered(row[k])
            least, most = min(least, number), max(most, number)
        low[m], high[m] = _ordered(least), _ordered(most)


@jit
def round_rows(x, scale, zero, top, less, codes, sums):
    """`x` fp32 [M, K] on each row's grid -> `codes` int8 or uint8 [M, K], `less` less than they
    are, and `sums` int32 [M] of these."""
    one, top, less = codes.dtype.type, np.float32(top), _int(less)
    for m in range(len(x)):
        row, line, unit, origin, total = x[m], codes[m], scale[m], zero[m], _int(0)
        for k in range(len(row)):
            place = np.rint(row[k] / unit + origin)
            place = place if place > _zero else _zero  # of a NaN too
            place = place if place < top else top
            code = _int(_int(place) - less)
            total += code
            line[k] = one(code)
        sums[m] = total


@jit
def finish(sums, first, total, second, zero, w_scale, a_scale, bias, out, begin):
    """`out[:, begin:]` fp32 = (sums + first * total + second * zero) * w_scale * a_scale + bias.

    `sums` int32 or fp32 [M, N]; `first`, `second`, `a_scale` [M]; `total`, `zero`, `w_scale`,
    `bias` [N]. An empty `second` or `bias` stands for zeros.
    """
    uneven, biased = len(second) > 0, len(bias) > 0
    for m in range(len(sums)):
        row, line = sums[m], out[m, begin : begin + sums.shape[1]]
        left, unit = first[m], a_scale[m]
        if uneven:
            more = second[m]
            for n in range(len(row)):
                number = np.float32(row[n]) + left * total[n] + more * zero[n]
                line[n] = number * w_scale[n] * unit
        else:
            for n in range(len(row)):
                line[n] = (np.float32(row[n]) + left * total[n]) * w_scale[n] * unit
        if biased:
            for n in range(len(row)):
                line[n] += bias[n]
