"""Packed codes to bytes and to fp32 in one pass, as numba compiles it for a CPU.

The twins in plain torch are `layout.unpack_by_phase` and `dequantize_gemm._widen`: codes come out
in the order of phases that `layout.py` describes, so that loops run over neighbours. Eight bytes
are shifted and masked at a time, as one number of 64 bits whose bytes do not meet. Loops begin at
0 and run over slices: numba would check other indices for being negative, one by one.
"""

from __future__ import annotations

import numpy as np

from .floats_numba import load, store
from .jit import jit
from .tiles_numba import BOTH, LANES, OUTPUTS, multiply

_byte, _int, _word, _float = np.uint8, np.int32, np.uint64, np.float32
_BYTES = np.uint64(0x0101010101010101)
_CHUNK, _WIDE = 258, 1024  # rows and outputs at a time


@jit
def every(plane, stride, line):
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
    for width in widths:
        per = 8 // width
        length = -(-columns * width // 8)
        mask, up = _word(_BYTES * _word((1 << width) - 1)), _word(shift)
        for first in range(phases // per):
            every(packed[start + first : start + length], phases // per, own)
            for place in range(per):
                made, down = line[first * per + place], _word(place * width)
                if shift:
                    for q in range(len(made)):
                        made[q] |= ((words[q] >> down) & mask) << up
                else:
                    for q in range(len(made)):
                        made[q] = (words[q] >> down) & mask
        start, shift = start + length, shift + width


@jit
def arrange(x, phases, out):
    """`x` [rows, columns] in the order of phases, then zeros: `out` [rows, phases, ...]."""
    columns = x.shape[1]
    for row in range(len(x)):
        for phase in range(phases):
            every(x[row, min(phase, columns) :], phases, out[row, phase])


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

    `tables` [1 or rows, 1 or groups, levels], `zero`, `scale` [1 or rows, groups]; see `_numbers`.
    """
    _, phases, each = out.shape
    line, own = np.empty((phases, -(-each // 8)), _word), np.empty(-(-each // 8) * 8, _byte)
    for row in range(len(packed)):
        known = tables[min(row, len(tables) - 1)]
        _numbers(
            packed[row], signed, widths, columns, size, known, zero[min(row, len(zero) - 1)],
            scale[min(row, len(scale) - 1)], line, own, out[row],
        )  # fmt: skip


@jit
def widen_to_bf16(packed, signed, widths, columns, size, tables, zero, scale, units, out):
    """The same times `units` fp32 [1 or rows], to `out` int16 of bf16 [rows, phases * columns]."""
    phases = 8 // widths[-1]
    each = out.shape[1] // phases
    line, own = np.empty((phases, -(-each // 8)), _word), np.empty(-(-each // 8) * 8, _byte)
    wide = np.empty((phases, each), _float)
    numbers = wide.reshape(phases * each)
    for row in range(len(packed)):
        known = tables[min(row, len(tables) - 1)]
        _numbers(
            packed[row], signed, widths, columns, size, known, zero[min(row, len(zero) - 1)],
            scale[min(row, len(scale) - 1)], line, own, wide,
        )  # fmt: skip
        unit = units[min(row, len(units) - 1)]
        for k in range(len(numbers)):
            numbers[k] *= unit
        store(numbers, True, out[row])


@jit
def product(
    x, short, packed, signed, widths, columns, size, tables, zero, scale, units, bias, out, place
):  # fmt: skip
    """Rows `x` [M, columns] times a weight [n, columns], which is widened a panel at a time in the
    second cache (see `widen`): `out` [M, N] from column `place` on.

    `x` and `out` are int16, of bf16 where `short`, else of fp32. What comes out is multiplied by
    `units` [n]; `bias` [n] is added; where they are empty, nothing is.
    """
    phases, outputs = 8 // widths[-1], len(packed)
    each = -(-columns // phases)
    row = -(-phases * each // LANES) * LANES
    most = -(-outputs // -(-outputs // _WIDE))
    most = -(-most // OUTPUTS) * OUTPUTS
    chunk = -(-len(x) // -(-len(x) // _CHUNK))
    left = np.zeros((-(-chunk // BOTH) * BOTH, row), _float)
    right, panel = np.zeros((OUTPUTS, row), _float), np.empty((OUTPUTS, row), _float)
    given, sums = np.empty(columns, _float), np.empty((len(left), most), _float)
    line, own = np.empty((phases, -(-each // 8)), _word), np.empty(-(-each // 8) * 8, _byte)
    width = 1 if short else 2  # of a number, in int16
    for begin in range(0, len(x), chunk):
        count = min(chunk, len(x) - begin)
        for m in range(count):
            load(x[begin + m], short, given)
            for phase in range(phases):
                places = slice(phase * each, (phase + 1) * each)
                every(given[min(phase, columns) :], phases, left[m, places])
        for start in range(0, outputs, most):
            end = min(start + most, outputs)
            sums[:] = 0
            for first in range(start, end, OUTPUTS):
                for n in range(first, min(first + OUTPUTS, end)):
                    wide = right[n - first, : phases * each].reshape(phases, each)
                    _numbers(
                        packed[n], signed, widths, columns, size, tables[min(n, len(tables) - 1)],
                        zero[min(n, len(zero) - 1)], scale[min(n, len(scale) - 1)], line, own, wide,
                    )  # fmt: skip
                multiply(left, count, right, panel, sums, first - start)
            for m in range(count):
                found = sums[m, : end - start]
                if len(units):
                    times = units[start:end]
                    for n in range(len(times)):
                        found[n] *= times[n]
                if len(bias):
                    more = bias[start:end]
                    for n in range(len(more)):
                        found[n] += more[n]
                store(found, short, out[begin + m, width * (place + start) : width * (place + end)])
