"""Packed codes to bytes and to fp32 in one pass, as numba compiles it for a CPU.

The twins in plain torch are `layout.unpack_by_phase` and `dequantize_gemm._widen`: codes come out
in the order of phases that `layout.py` describes, so that loops run over neighbours. Eight bytes
are shifted and masked at a time, as one number of 64 bits whose bytes do not meet. Loops begin at
0 and run over slices: numba would check other indices for being negative, one by one.
"""

from __future__ import annotations

import numpy as np

from .jit import jit, jit_fast

_byte, _int, _word, _float = np.uint8, np.int32, np.uint64, np.float32
_BYTES = np.uint64(0x0101010101010101)


@jit
def _every(plane, stride, line):
    """Every `stride`-th byte of a plane to `line`, and zeros after the last one."""
    count = min(len(line), -(-len(plane) // stride))
    if stride == 1:  # constant strides, for LLVM
        for q in range(count):
            line[q] = plane[q]
    elif stride == 2:
        for q in range(count):
            line[q] = plane[2 * q]
    elif stride == 4:
        for q in range(count):
            line[q] = plane[4 * q]
    else:
        for q in range(count):
            line[q] = plane[8 * q]
    line[count:] = 0


@jit
def _row(packed, widths, columns, line, own):
    """Codes of one packed row to `line` uint64 [phases, words], eight codes a word; `own` uint8
    [8 * words] is scratch."""
    phases, start, shift = len(line), 0, 0
    words = own.view(_word)
    line[:] = 0
    for width in widths:
        per = 8 // width
        length = -(-columns * width // 8)
        mask, up = _word(_BYTES * _word((1 << width) - 1)), _word(shift)
        for first in range(phases // per):
            _every(packed[start + first : start + length], phases // per, own)
            for place in range(per):
                made, down = line[first * per + place], _word(place * width)
                for q in range(len(made)):
                    made[q] |= ((words[q] >> down) & mask) << up
        start, shift = start + length, shift + width


@jit
def arrange(x, phases, out):
    """`x` [rows, columns] in the order of phases, then zeros: `out` [rows, phases, ...]."""
    columns = x.shape[1]
    for row in range(len(x)):
        for phase in range(phases):
            _every(x[row, min(phase, columns) :], phases, out[row, phase])


@jit
def unpack(packed, widths, columns, out):
    """`packed` uint8 [rows, row bytes] -> `out` uint8 [rows, phases, columns a phase]."""
    _, phases, each = out.shape
    line, own = np.empty((phases, -(-each // 8)), _word), np.empty(-(-each // 8) * 8, _byte)
    codes = line.view(_byte)
    for row in range(len(packed)):
        _row(packed[row], widths, columns, line, own)
        for phase in range(phases):
            given, target = codes[phase], out[row, phase]
            for q in range(each):
                target[q] = given[q]


@jit
def _numbers(packed, signed, widths, columns, size, tables, zero, scale, line, own, out):
    """One row -> `out` fp32 [phases, columns a phase], (level - zero) * scale.

    `signed`: whether the row is bytes with a sign, codes of 8 bits less 128. `tables` fp32
    [1 or groups, levels]: what codes stand for; without levels they stand for themselves. `zero`,
    `scale` fp32 [groups], one group for each `size` columns a phase.
    """
    if not signed:
        _row(packed, widths, columns, line, own)
    codes, numbers = line.view(_byte), packed.view(np.int8)
    phases, each = out.shape
    for phase in range(phases):
        for group in range(len(zero)):
            places = slice(group * size, min((group + 1) * size, each))
            given, target = codes[phase, places], out[phase, places]
            origin, unit = zero[group], scale[group]
            if signed:
                origin -= _float(128)
                bytes_ = numbers[places]
                for q in range(len(target)):
                    target[q] = (_float(_int(bytes_[q])) - origin) * unit
            elif tables.shape[1]:
                table = tables[min(group, len(tables) - 1)]
                for q in range(len(target)):
                    target[q] = (table[given[q]] - origin) * unit
            else:
                for q in range(len(target)):
                    target[q] = (_float(_int(given[q])) - origin) * unit


@jit
def widen(packed, signed, widths, columns, size, tables, zero, scale, out):
    """`packed` uint8 [rows, row bytes] -> `out` fp32 [rows, phases, columns a phase].

    `tables` [1 or rows, 1 or groups, levels], `zero`, `scale` [rows, groups]; see `_numbers`.
    """
    _, phases, each = out.shape
    line, own = np.empty((phases, -(-each // 8)), _word), np.empty(-(-each // 8) * 8, _byte)
    for row in range(len(packed)):
        known = tables[min(row, len(tables) - 1)]
        _numbers(
            packed[row], signed, widths, columns, size, known, zero[row], scale[row], line, own,
            out[row],
        )  # fmt: skip


@jit_fast
def _dots(x, y, weight, first, second):
    """Products of two rows with four of a weight: `first`, `second` [4]."""
    a, b, c, d = weight[0], weight[1], weight[2], weight[3]
    p, q, r, s = _float(0), _float(0), _float(0), _float(0)
    t, u, v, w = _float(0), _float(0), _float(0), _float(0)
    for k in range(len(x)):
        i, j = x[k], y[k]
        p += i * a[k]
        q += i * b[k]
        r += i * c[k]
        s += i * d[k]
        t += j * a[k]
        u += j * b[k]
        v += j * c[k]
        w += j * d[k]
    first[0], first[1], first[2], first[3] = p, q, r, s
    second[0], second[1], second[2], second[3] = t, u, v, w


@jit_fast
def _dot(x, weight):
    total = _float(0)
    for k in range(len(weight)):
        total += x[k] * weight[k]
    return total


@jit
def few(x, packed, signed, widths, columns, size, tables, zero, scale, out, place):
    """A few rows `x` fp32 [M, phases * columns a phase], in the order of phases, times each row of
    a weight (see `widen`), four of which are widened in the first cache: `out` fp32 [M, N] from
    column `place` on."""
    count, phases = len(x), 8 // widths[-1]
    each = x.shape[1] // phases
    line, own = np.empty((phases, -(-each // 8)), _word), np.empty(-(-each // 8) * 8, _byte)
    wide = np.empty((4, phases, each), _float)
    flat = wide.reshape(4, -1)
    for begin in range(0, len(packed), 4):
        tall = min(4, len(packed) - begin)
        for i in range(tall):
            row = begin + i
            known = tables[min(row, len(tables) - 1)]
            _numbers(
                packed[row], signed, widths, columns, size, known, zero[row], scale[row], line, own,
                wide[i],
            )  # fmt: skip
        at = place + begin
        m = 0
        while tall == 4 and m + 2 <= count:
            _dots(x[m], x[m + 1], flat, out[m, at : at + 4], out[m + 1, at : at + 4])
            m += 2
        while m < count:
            for i in range(tall):
                out[m, at + i] = _dot(x[m], flat[i])
            m += 1
