"""Trellis codes as numba compiles them for a CPU: Viterbi's algorithm, and decoding to bytes.

Imported only where numba is there. Numbers stay in 32 bits by explicit casts (numba would widen
them to 64), and loops run over contiguous slices, so that LLVM makes vector instructions of them:
2**12 states take a microsecond or two a weight on a core with AVX-512. Costs of one tile lie in the
first cache. The twins are `trellis_encode.encode_slow` and `trellis.decode`.
"""

from __future__ import annotations

import numpy as np

from .jit import jit
from .trellis import COLUMNS

_int = np.int32
_FORBIDDEN = 2**29


@jit
def _repeat_4(given, out):
    for g in range(len(given)):
        for b in range(4):
            out[4 * g + b] = given[g]


@jit
def _repeat_8(given, out):
    for g in range(len(given)):
        for b in range(8):
            out[8 * g + b] = given[g]


@jit
def _advance(cost, wide, x, values, bits, best):
    """One weight: `cost` of each overlap before it -> after it, and by which symbol into `best`."""
    low = len(cost)
    if bits == 3:
        _repeat_8(cost, wide)
    else:
        _repeat_4(cost, wide)
        if bits == 4:  # 16 times would not be vectorized
            narrow = wide[: 4 * low].copy()
            _repeat_4(narrow, wide)
    shift = _int(bits)
    for g in range(low):
        d = _int(x - values[g])
        cost[g] = _int(wide[g] + _int(_int(d * d) << shift))
    for j in range(1, 1 << bits):
        level, before, came = (
            values[j * low : (j + 1) * low],
            wide[j * low : (j + 1) * low],
            _int(j),
        )
        for g in range(low):
            d = _int(x - level[g])
            total = _int(_int(before[g] + came) + _int(_int(d * d) << shift))
            cost[g] = min(total, cost[g])
    mask = _int((1 << bits) - 1)
    for g in range(low):
        best[g] = np.uint8(cost[g] & mask)
        cost[g] = _int(cost[g] & ~mask)


@jit
def _path(x, values, bits, start, cost, wide, best, out):
    """The cheapest states of one tile; `start`: the overlap it begins and ends in, -1 = any."""
    low = len(cost)
    if start < 0:
        cost[:] = 0
    else:
        cost[:] = _FORBIDDEN
        cost[start] = 0
    for t in range(len(x)):
        _advance(cost, wide, x[t], values, bits, best[t])
    at = np.argmin(cost) if start < 0 else start
    for t in range(len(x) - 1, -1, -1):
        state = best[t, at] * low + at
        out[t] = state
        at = state >> bits


@jit
def encode(tiles, values, bits, states, seam, out):
    """States -> `out` int32 [n, length], of `tiles` int32 [n, length]; `values` [2**states]."""
    length = tiles.shape[1]
    low = 1 << (states - bits)
    cost, wide = np.empty(low, _int), np.empty(1 << states, _int)
    best = np.empty((length, low), np.uint8)
    turned, found = np.empty(length, _int), np.empty(length, _int)
    ends, passed = np.empty(2 * seam, _int), np.empty(2 * seam, _int)
    for i in range(len(tiles)):
        for t in range(length):
            turned[t] = tiles[i, length - 1 - t]
        ends[:seam] = turned[length - seam :]
        ends[seam:] = turned[:seam]
        _path(ends, values, bits, -1, cost, wide, best, passed)
        _path(turned, values, bits, passed[seam] >> bits, cost, wide, best, found)
        for t in range(length):
            out[i, t] = found[length - 1 - t]


@jit
def decode(packed, bits, table, high, out):
    """Levels of row tiles, uint8 [down, across, high * bits / 2] -> `out` int8 [rows, columns].

    `table` int8 [2**states]: the level of each state, which lies in the first cache.
    """
    down, across, size = packed.shape
    rows, columns = out.shape
    mask, shift = np.uint64(len(table) - 1), np.uint64(bits)
    stream = np.zeros(size + 8, np.uint8)
    for i in range(down):
        last = min(high, rows - i * high)
        for j in range(across):
            tile = packed[i, j]
            for b in range(size):
                stream[b] = tile[b]
            for b in range(8):
                stream[size + b] = tile[b]
            wide = min(COLUMNS, columns - j * COLUMNS)
            for r in range(last):
                begin = 4 * bits * r
                byte = begin >> 3
                window = np.uint64(0)  # of a row's 4 weights: their bits, and a state's rest
                for b in range(8):
                    window |= np.uint64(stream[byte + b]) << np.uint64(8 * b)
                window >>= np.uint64(begin & 7)
                line = out[i * high + r, j * COLUMNS : j * COLUMNS + wide]
                if wide == COLUMNS:
                    for c in range(COLUMNS):
                        line[c] = table[window & mask]
                        window >>= shift
                else:
                    for c in range(wide):
                        line[c] = table[window & mask]
                        window >>= shift
