"""Products of bytes with `vpdpbusd` (AVX512-VNNI), as numba compiles them: an integer GEMM for
rounded activations, and activations as they are as two or three bytes each.

oneDNN's int8 GEMM takes a weight of bytes that it packs in each call, and torch's operations around
it as long as itself where rows are few. Here codes of any width become a panel of 32 outputs in the
first cache, as `vpdpbusd` takes it, and what the sums become is worked out in the same call.

Rows come in an order of blocks, so that codes need no shuffling: with P codes in a byte of the
narrowest plane (`layout.py`), place 4 P b + 4 f + q holds column (4 b + q) P + f.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .floats_numba import load, store
from .jit import jit
from .rows_numba import ends_of, finish, rounded
from .tiles_numba import tile, transposer

_byte, _signed, _int, _float = np.uint8, np.int8, np.int32, np.float32
_word = np.uint64
_INFINITE = np.float32(np.inf)
OUTPUTS, _LANES, _ROWS = 32, 16, 8  # of a panel, of a vector, of a tile
_STEP = 4 * OUTPUTS  # bytes of a panel that belong to four bytes of a row
_CHUNK, _WIDE = 64, 1024  # rows and outputs at a time
_transpose, _tile, _line = transposer(_LANES), tile(_LANES, _ROWS), tile(_LANES, 1)


@jit
def blocks_of(columns, phases):
    """Blocks that a row of so many columns has."""
    return -(-columns // (4 * phases))


@jit
def _order(columns, phases, row):
    """The column at each place of a row of blocks; `columns`, one beyond them, for a zero."""
    found = np.empty(row, np.uint32)
    for k in range(row):
        inner = k % (4 * phases)
        found[k] = min(k - inner + inner % 4 * phases + inner // 4, columns)
    return found


@jit
def _arrange(row, phases, order, out):
    """A row in the order of blocks, then zeros."""
    columns = len(row)
    if phases == 1:
        out[:columns] = row
        out[columns:] = 0
        return
    whole = columns // (4 * phases) * 4 * phases
    for k in range(whole):
        out[k] = row[order[k]]
    for k in range(whole, len(out)):
        out[k] = row[order[k]] if order[k] < columns else 0


@intrinsic
def _pick(typing, given, count, mask, down, up, keep, out, step):
    """Codes of one phase of `count` words of a panel: `(given >> down & mask) << up` to `out`,
    `step` bytes from one word to the next, beside what `keep` leaves of it."""

    def generate(context, builder, signature, arguments):
        whole, short = ir.IntType(64), ir.IntType(32)
        many = ir.VectorType(short, OUTPUTS)
        given, count, *numbers, out, step = arguments
        empty, zeros = ir.Constant(many, ir.Undefined), ir.Constant(many, [0] * OUTPUTS)
        everywhere = []
        for number in numbers:
            small = builder.trunc(number, short)
            first = builder.insert_element(empty, small, ir.Constant(short, 0))
            everywhere.append(builder.shuffle_vector(first, empty, zeros))
        mask, down, up, keep = everywhere
        with cgutils.for_range(builder, count, intp=whole) as loop:
            source = builder.add(given, builder.mul(loop.index, ir.Constant(whole, _STEP)))
            target = builder.add(out, builder.mul(loop.index, step))
            source, target = (builder.inttoptr(p, many.as_pointer()) for p in (source, target))
            code = builder.and_(builder.lshr(builder.load(source, align=4), down), mask)
            others = builder.and_(builder.load(target, align=4), keep)
            builder.store(builder.or_(builder.shl(code, up), others), target, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


@intrinsic
def _halve(typing, given, count, even, odd):
    """Every second byte of each output's: of 2 * `count` words of a panel to `count` each."""

    def generate(context, builder, signature, arguments):
        whole, many = ir.IntType(64), ir.VectorType(ir.IntType(8), 64)
        given, count, *outs = arguments
        with cgutils.for_range(builder, count, intp=whole) as loop:
            for half in (0, 64):
                place = builder.add(builder.mul(loop.index, ir.Constant(whole, _STEP)), whole(half))
                source = builder.add(given, builder.add(place, builder.sub(place, whole(half))))
                words = [
                    builder.load(builder.inttoptr(p, many.as_pointer()), align=1)
                    for p in (source, builder.add(source, whole(_STEP)))
                ]
                for first, out in enumerate(outs):
                    places = [
                        64 * (q // 2) + 4 * word + 2 * (q % 2) + first
                        for word in range(_LANES)
                        for q in range(4)
                    ]
                    picked = ir.Constant(ir.VectorType(ir.IntType(32), 64), places)
                    target = builder.inttoptr(builder.add(out, place), many.as_pointer())
                    builder.store(builder.shuffle_vector(*words, picked), target, align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@jit
def _apart(given, spare, count, stride):
    """Parts of a plane's panel, `count` words each, of every `stride`-th byte: where they begin;
    part j is the one whose place has j's bits in reverse."""
    parts = 1
    while parts < stride:
        words = count * stride // parts // 2
        for part in range(parts):
            place = part * 2 * words * _STEP
            _halve(given + place, words, spare + place, spare + place + words * _STEP)
        given, spare, parts = spare, given, 2 * parts
    return given


@jit
def gather(packed, begin, lines):
    """`OUTPUTS` rows of `packed` from `begin` on, as many as there are, to `lines`; their address.
    One after the other: 32 streams would each wait for memory."""
    rows, row = min(OUTPUTS, len(packed) - begin), packed.shape[1]
    given = packed[begin : begin + rows].reshape(rows * row)
    for k in range(len(given)):
        lines[k] = given[k]
    return lines.ctypes.data


@jit
def turn(given, row, size, out):
    """The first `size` bytes of `OUTPUTS` rows, `row` bytes apart, to words of a panel."""
    for half in range(0, OUTPUTS, _LANES):
        for k in range(0, size, 64):
            _transpose(given + half * row + k, row, out + k // 4 * _STEP + 4 * half)


@jit
def codes_panel(packed, begin, widths, columns, lines, planes, panel):
    """Codes of `OUTPUTS` rows of `packed` from `begin` on to `panel` uint8 [words, OUTPUTS, 4];
    rows that are not there, and columns, become anything.

    `lines` uint8 [OUTPUTS * row bytes + 128] and `planes` uint8 [2, bytes] are scratch.
    """
    phases, row = 8 // widths[-1], packed.shape[1]
    blocks = blocks_of(columns, phases)
    base = gather(packed, begin, lines)
    start, shift = 0, 0
    if widths[0] == 8:
        turn(base, row, 4 * blocks, panel.ctypes.data)
        return
    for width in widths:
        stride = phases * width // 8
        given = planes.ctypes.data
        turn(base + start, row, 4 * blocks * stride, given)
        given = _apart(given, given + planes.shape[1], blocks, stride)
        per, mask = 8 // width, ((1 << width) - 1) * 0x01010101
        for phase in range(phases):
            part = phase // per
            if stride == 4:
                part = part // 2 + part % 2 * 2
            _pick(
                given + part * blocks * _STEP, blocks, mask, phase % per * width, shift,
                -1 if shift else 0, panel.ctypes.data + phase * _STEP, phases * _STEP,
            )  # fmt: skip
        start, shift = start + -(-columns * width // 8), shift + width


@jit
def _unsigned(panel):
    """Bytes with a sign to codes, 128 more."""
    words = panel.view(_word)
    for k in range(len(words)):
        words[k] ^= _word(0x8080808080808080)


@jit
def _multiply(left, begin, end, panel, sums, place, ahead, size):
    """`left` uint8 or int8 [R, bytes] from `begin` to `end` times `panel`: `sums` int32 [R, N] from
    column `place` on. `ahead` is the address of the `size` bytes that the next panel is made of:
    they are fetched to the second cache meanwhile."""
    row, c_row = left.shape[1], 4 * sums.shape[1]
    x, w, y = left.ctypes.data, panel.ctypes.data, sums.ctypes.data + 4 * place
    whole = len(left) // _ROWS * _ROWS
    rate = -(-size // max(1, (end - begin) * (whole // _ROWS)))
    x, w, length = x + begin, w + begin * OUTPUTS, end - begin
    for m in range(0, whole, _ROWS):
        _tile(left, x + m * row, row, w, length, y + m * c_row, c_row, 1, ahead, rate)
        ahead += rate * length
    for m in range(whole, len(left)):
        _line(left, x + m * row, row, w, length, y + m * c_row, c_row, 1, ahead, 0)


@jit
def following(packed, begin):
    """Address and bytes of the `OUTPUTS` rows from `begin` on; of nothing beyond the last one."""
    row, rows = packed.shape[1], max(0, min(OUTPUTS, len(packed) - begin))
    return packed.ctypes.data + begin * row, rows * row


@jit
def scratch(packed, widths, columns):
    """`lines`, `planes` and `panel` of `codes_panel`; bytes of a row of blocks."""
    phases = 8 // widths[-1]
    row = 4 * phases * blocks_of(columns, phases)
    lines = np.zeros(OUTPUTS * packed.shape[1] + 128, _byte)
    size = OUTPUTS * (-(-row // 64) * 64)
    planes = np.empty((2, 0 if widths[0] == 8 else size), _byte)
    return lines, planes, np.empty(size, _byte), row


@jit
def product(
    codes, packed, widths, columns, first, total, second, zero, w_scale, a_scale, bias, short, out,
    place,
):  # fmt: skip
    """`codes` uint8 [M, K] times codes `packed` uint8 [n, row bytes], finished: see
    `rows_numba.finish`, which says what the other arguments are; `place` is the first column of
    `out` that is written.
    """
    lines, planes, panel, row = scratch(packed, widths, columns)
    phases = 8 // widths[-1]
    left = np.empty((min(_CHUNK, len(codes)), row), _byte)
    wide = -(-min(_WIDE, len(packed)) // OUTPUTS) * OUTPUTS
    sums = np.empty((len(left), wide), _int)
    order = _order(columns, phases, row)
    for begin in range(0, len(codes), _CHUNK):
        m = slice(begin, min(begin + _CHUNK, len(codes)))
        count = m.stop - m.start
        for k in range(count):
            _arrange(codes[begin + k], phases, order, left[k])
        for start in range(0, len(packed), wide):
            n = slice(start, min(start + wide, len(packed)))
            for own in range(0, n.stop - start, OUTPUTS):
                codes_panel(packed, start + own, widths, columns, lines, planes, panel)
                ahead, size = following(packed, start + own + OUTPUTS)
                _multiply(left[:count], 0, row, panel, sums, own, ahead, size)
            finish(
                sums[:count, : n.stop - start], first[m], total[n], second[m], zero[n],
                w_scale[n], a_scale[m], bias[n], short, out[m], place + start,
            )  # fmt: skip


@jit
def rounded_product(
    x, short, low, high, top, packed, widths, columns, total, zero, w_scale, bias, out
):  # fmt: skip
    """The same with rows `x` [M, K] that are rounded first (`rows_numba.round_rows`, which says
    what the first arguments are): `out` int16 of bf16 where `short`, else of fp32.
    """
    codes, first, second, a_scale = rounded(x, short, low, high, top, columns, len(zero) > 0)
    product(
        codes, packed, widths, columns, first, total, second, zero, w_scale, a_scale, bias, short,
        out, 0,
    )  # fmt: skip


@jit
def _digits(line, count, unit, whole):
    """fp32 numbers in units of `unit`, rounded, to `whole` int32, 128 more in each digit."""
    more = _int(0x808080 if count == 3 else 0x8080)
    for k in range(len(line)):
        whole[k] = _int(_int(np.rint(line[k] / unit)) + more)


@jit
def _digit(whole, place, digit):
    for k in range(len(whole)):
        digit[k] = _signed(_int(_int(whole[k] >> place) & _int(255)) - _int(128))


@jit
def _combine(sums, rows, count, zero, scale, totals, made, place):
    """Adds to `made` fp32 [rows, N] from column `place` on what a group of columns gives: `sums`
    int32 [count * rows, N] are of the lowest digits, then the next; `totals` fp32 [rows] those of
    the rows themselves."""
    top = _float(65536 if count == 3 else 0)
    for m in range(rows):
        low, middle, high = sums[m], sums[rows + m], sums[(count - 1) * rows + m]
        target, total = made[m, place : place + OUTPUTS], totals[m]
        for n in range(OUTPUTS):
            number = _float(low[n]) + _float(middle[n]) * _float(256) + _float(high[n]) * top
            target[n] += scale[n] * (number - zero[n] * total)


@jit
def digits_product(
    x, short, count, packed, widths, columns, size, zero, scale, units, bias, out, place
):  # fmt: skip
    """Rows `x` [M, columns], each a scale times numbers of `count` bytes, times a weight [n,
    columns]: `out` [M, N] from column `place` on.

    `x` and `out` are int16, of bf16 where `short`, else of fp32. `zero`, `scale` fp32 [1 or n,
    groups], one for each `size` columns. What comes out is multiplied by `units` [n]; `bias` [n] is
    added; where they are empty, nothing is. A row that holds something not finite becomes NaN.
    """
    lines, planes, panel, row = scratch(packed, widths, columns)
    phases, groups = 8 // widths[-1], zero.shape[1]
    chunk = min(_CHUNK, len(x))
    left = np.empty((count * chunk, row), _signed)
    sums = np.empty((len(left), OUTPUTS), _int)
    line, whole, placed = (
        np.empty(columns, _float),
        np.empty(columns + 1, _int),
        np.empty(row, _int),
    )
    order, ends = _order(columns, phases, row), np.empty(2, _float)
    wide = -(-min(_WIDE, len(packed)) // OUTPUTS) * OUTPUTS
    made = np.empty((chunk, wide), _float)
    row_scale, totals = np.empty(chunk, _float), np.empty((groups, chunk), _float)
    origins, factors = np.empty((groups, OUTPUTS), _float), np.empty((groups, OUTPUTS), _float)
    more, most = (0x808080, 0x7F7F7F - 2) if count == 3 else (0x8080, 0x7F7F - 2)
    form = 1 if short else 2  # of a number, in int16
    whole[columns] = more  # digits of zero
    for begin in range(0, len(x), chunk):
        rows = min(chunk, len(x) - begin)
        for m in range(rows):
            load(x[begin + m], short, line)
            ends_of(line, ends)
            finite = ends[0] > -_INFINITE and ends[1] < _INFINITE
            unit = _float(max(-ends[0], ends[1], _float(1e-30)) / _float(most))
            row_scale[m] = unit if finite else _float(np.nan)
            _digits(line, count, unit, whole)
            for group in range(groups):
                begins, ends_at, total = group * size, min((group + 1) * size, columns), 0
                for k in range(begins, ends_at):
                    total += whole[k]
                totals[group, m] = total - more * (ends_at - begins)
            for k in range(row):
                placed[k] = whole[order[k]]
            for p in range(count):
                _digit(placed, _int(8 * p), left[p * rows + m])
        for start in range(0, len(packed), wide):
            n = slice(start, min(start + wide, len(packed)))
            times, added, outputs = units[n], bias[n], n.stop - start
            made[:] = 0
            for first in range(start, n.stop, OUTPUTS):
                codes_panel(packed, first, widths, columns, lines, planes, panel)
                if widths[0] == 8:
                    _unsigned(panel)
                for k in range(min(OUTPUTS, n.stop - first)):
                    for group in range(groups):
                        origins[group, k] = zero[min(first + k, len(zero) - 1), group]
                        factors[group, k] = scale[min(first + k, len(scale) - 1), group]
                ahead, each = following(packed, first + OUTPUTS)
                each //= groups
                for group in range(groups):
                    end = row if group == groups - 1 else (group + 1) * size
                    _multiply(
                        left[: count * rows], group * size, end, panel, sums, 0,
                        ahead + group * each, each,
                    )  # fmt: skip
                    _combine(
                        sums, rows, count, origins[group], factors[group], totals[group], made,
                        first - start,
                    )  # fmt: skip
            for m in range(rows):
                found, unit = made[m, :outputs], row_scale[m]
                if len(units):
                    for k in range(outputs):
                        found[k] = found[k] * unit * times[k]
                else:
                    for k in range(outputs):
                        found[k] *= unit
                if len(bias):
                    for k in range(outputs):
                        found[k] += added[k]
                places = slice(form * (place + start), form * (place + n.stop))
                store(found, short, out[begin + m, places])
