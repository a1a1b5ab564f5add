"""An exact integer GEMM for x86 cores without VNNI, as numba compiles it: bytes are widened to 16
bits and multiplied in tiles (`tiles_numba.py`).

Some rows at a time are widened, and for these a panel of the weight after the other; what the sums
become is worked out while they are in the second cache.
"""

from __future__ import annotations

import numpy as np

from .jit import jit
from .rows_numba import finish, rounded
from .tiles_numba import BOTH, LANES, OUTPUTS, multiply

_short, _int = np.int16, np.int32
_CHUNK = 258  # rows at a time
_WIDE = 1024  # outputs at a time


@jit
def _widen(bytes_, wide):
    """`bytes_` [m, columns] to `wide` int16, which has zeros behind them."""
    columns = bytes_.shape[1]
    for m in range(len(bytes_)):
        given, line = bytes_[m], wide[m]
        for k in range(len(given)):
            line[k] = given[k]
        line[columns:] = 0


@jit
def product(codes, weight, origin, total, second, zero, w_scale, a_scale, bias, short, out, place):
    """`codes` bytes [M, K] times `weight` int8 [n, K], finished: see `rows_numba.finish`, which
    says what the other arguments are; `place` is the first column of `out` that is written.
    """
    row = -(-codes.shape[1] // LANES) * LANES
    wide = -(-len(weight) // -(-len(weight) // _WIDE))
    wide = -(-wide // OUTPUTS) * OUTPUTS
    chunk = -(-len(codes) // -(-len(codes) // _CHUNK))
    left = np.zeros((-(-chunk // BOTH) * BOTH, row), _short)
    right, panel = np.zeros((OUTPUTS, row), _short), np.empty((OUTPUTS, row), _short)
    sums = np.empty((len(left), wide), _int)
    for begin in range(0, len(codes), chunk):
        m = slice(begin, min(begin + chunk, len(codes)))
        count = m.stop - m.start
        _widen(codes[m], left)
        for start in range(0, len(weight), wide):
            n = slice(start, min(start + wide, len(weight)))
            sums[:] = 0
            for first in range(0, n.stop - start, OUTPUTS):
                _widen(weight[start + first : min(start + first + OUTPUTS, n.stop)], right)
                multiply(left, count, right, panel, sums, first)
            finish(
                sums[:count, : n.stop - start], origin[m], total[n], second[m], zero[n],
                w_scale[n], a_scale[m], bias[n], short, out[m], place + start,
            )  # fmt: skip


@jit
def rounded_product(x, short, low, high, top, weight, total, zero, w_scale, bias, out):
    """The same with rows `x` [M, K] that are rounded first (`rows_numba.round_rows`, which says
    what the first arguments are): `out` int16 of bf16 where `short`, else of fp32.
    """
    codes, first, second, a_scale = rounded(
        x, short, low, high, top, weight.shape[1], len(zero) > 0
    )
    product(codes, weight, first, total, second, zero, w_scale, a_scale, bias, short, out, 0)
