"""The fast regular Hadamard transform as numba compiles it for a CPU: see `hadamard.py`.

A pass works on all groups of a row in one loop, which LLVM makes vector instructions of: it mixes
four neighbours and writes them a quarter of the row apart. So each pass brings the next digit of
the index (in base 4) to the end, and after the last one the row is [group, number of groups],
backwards.
"""

from __future__ import annotations

import numpy as np

from .jit import jit

_half = np.float32(0.5)


@jit
def _mix(given, out):
    """out[i + r * n] = half the sum of the four entries 4 i ..., less the r-th; n = a quarter."""
    n = len(given) // 4
    a, b, c, d = out[:n], out[n : 2 * n], out[2 * n : 3 * n], out[3 * n :]
    for i in range(n):
        w, x, y, z = given[4 * i], given[4 * i + 1], given[4 * i + 2], given[4 * i + 3]
        total = _half * ((w + x) + (y + z))
        a[i] = total - w
        b[i] = total - x
        c[i] = total - y
        d[i] = total - z


@jit
def rotate(x, group, out):
    """`x` fp32 [rows, channels] -> `out`, each `group` of neighbours rotated."""
    columns = x.shape[1]
    groups = columns // group
    first, second = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for row in range(len(x)):
        _mix(x[row], first)
        size = 4
        last, other = first, second
        while size < group:
            _mix(last, other)
            last, other = other, last
            size *= 4
        line = out[row]
        for g in range(groups):
            for i in range(group):
                line[g * group + i] = last[(group - 1 - i) * groups + g]
