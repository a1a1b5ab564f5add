"""Rows of fp32 or bf16 to fp32 and back, as numba compiles it for a CPU.

NumPy has no bf16, so rows of either type come as int16: a bf16 number is the upper half of an fp32
number.
"""

from __future__ import annotations

import numpy as np

from .jit import jit

_int, _short, _float = np.int32, np.int16, np.float32
_UP, _HALF, _ONE = np.int32(16), np.int32(0x7FFF), np.int32(1)
_INFINITE, _MAGNITUDE, _NAN = np.int32(0x7F800000), np.int32(0x7FFFFFFF), np.int32(0x7FC0)


@jit
def load(row, short, line):
    """`row` int16, of bf16 where `short`, else of fp32, to `line` fp32."""
    if short:
        bits = line.view(_int)
        for k in range(len(row)):
            bits[k] = _int(_int(row[k]) << _UP)
    else:
        numbers = row.view(_float)
        for k in range(len(numbers)):
            line[k] = numbers[k]


@jit
def store(line, short, row):
    """The inverse of `load`: to the nearest number, ties to even."""
    if short:
        bits = line.view(_int)
        for k in range(len(row)):
            number = bits[k]
            odd = _int(_int(number >> _UP) & _ONE)
            nearest = _int(_int(number + _int(_HALF + odd)) >> _UP)
            finite = _int(number & _MAGNITUDE) <= _INFINITE
            row[k] = _short(nearest if finite else _NAN)
    else:
        numbers = row.view(_float)
        for k in range(len(numbers)):
            numbers[k] = line[k]
