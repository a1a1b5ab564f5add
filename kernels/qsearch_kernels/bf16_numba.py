"""Products of bf16 rows with packed weights, as numba compiles them for a core with bf16 units.

oneDNN's bf16 GEMM takes a weight in memory: one that was packed is written there first, which takes
up to a third of the product's time. Here codes of any width become a panel of 32 outputs in the
second cache (`vnni_numba.py`, then to bf16), which a chunk of rows is multiplied with at once, in
tiles of 12 rows by two vectors of outputs: 24 sums in 32 registers (`vdpbf16_numba.py`).

Without groups a panel holds codes less a whole number near their zero, which bf16 holds exactly;
scale and the rest of the zero are applied to sums. With groups it holds (code - zero) * scale,
rounded. Rows come in the order of blocks that `vnni_numba.py` describes.
"""

from __future__ import annotations

import numpy as np

from .floats_numba import load
from .jit import jit, jit_fast
from .vdpbf16_numba import DIGITS, LANES, OUTPUTS, across, finish, tile, widener
from .vnni_numba import blocks_of, codes_panel, following, gather, scratch, turn

_short, _float = np.int16, np.float32
_HIGH, _LOW = 12, 8  # rows of a tile
_EACH = 4  # tiles of both heights make up any multiple of so many rows
#: rows at a time: at least, at most, and bytes of them: what the second cache does not hold comes
#: in one stream for each panel, which costs less than making panels again
_FEWEST, _MOST, _KEPT = 96, 1024, 5 * 2**19
_PIECE = 1152  # columns, nearly, whose products are summed before they are added to others
_high, _low = tile(_HIGH), tile(_LOW)
_widen_exactly, _widen_rounded = widener(True), widener(False)


@jit
def _heights(count):
    """Tiles of `_HIGH` rows and of `_LOW`, three and two times `_EACH`, for so many rows."""
    count = -(-count // _EACH)
    low = (0, 2, 1)[count % 3]
    if count == 1:
        return 0, 1
    return (count * _EACH - low * _LOW) // _HIGH, low


@jit
def _order(phases):
    """Columns of 32 in the order of blocks."""
    order = np.empty(2 * LANES, _short)
    for place in range(len(order)):
        block, left = place // (4 * phases), place % (4 * phases)
        order[place] = (4 * block + left % 4) * phases + left // 4
    return order


@jit
def _pack(x, steps, order, lines, left):
    """Rows `x` int16 of bf16 to tiles in `left`, the high ones first; `lines` [16, ...] is scratch,
    with zeros beyond the columns."""
    high, low = _heights(len(x))
    place, columns, m = left.ctypes.data, x.shape[1], 0
    for number in range(high + low):
        rows = _HIGH if number < high else _LOW
        base, row = x.ctypes.data + 2 * columns * m, 2 * columns
        if m + LANES > len(x) or columns % (2 * LANES):
            base, row = lines.ctypes.data, 2 * lines.shape[1]
            for k in range(min(rows, len(x) - m)):
                given, target = x[m + k], lines[k]
                for j in range(len(given)):
                    target[j] = given[j]
        for k in range(0, steps, LANES):
            across(base + 4 * k, row, order.ctypes.data, place + 4 * k * rows, 4 * rows)
        place += 4 * steps * rows
        m += rows


@jit
def _multiply(left, count, steps, begin, end, panel, sums, fresh, ahead, size):
    """Rows that `_pack` has laid out times `panel`, from one step to another: `sums` [rows, 32].
    `ahead` is the address of the `size` bytes that the next panel is made of."""
    high, low = _heights(count)
    x, w, y, length = left.ctypes.data, panel.ctypes.data, sums.ctypes.data, end - begin
    rate = -(-size // max(1, length * (high + low)))
    for number in range(high + low):
        if number < high:
            _high(x + 4 * begin * _HIGH, w, length, y, fresh, ahead, rate)
        else:
            _low(x + 4 * begin * _LOW, w, length, y, fresh, ahead, rate)
        rows = _HIGH if number < high else _LOW
        x, y = x + 4 * steps * rows, y + 4 * OUTPUTS * rows
        ahead += rate * length


@jit_fast
def _total(line):
    total = _float(0)
    for k in range(len(line)):
        total += line[k]
    return total


@jit
def _by_group(numbers, start, out):
    """fp32 `numbers` [1 or n, groups] of the outputs from `start` on to `out` [groups, 32]."""
    groups = numbers.shape[1]
    row = 4 * groups
    if len(numbers) == 1:
        for group in range(groups):
            line, number = out[group], numbers[0, group]
            for n in range(OUTPUTS):
                line[n] = number
    elif (len(numbers) - start) * groups >= OUTPUTS * groups + LANES:
        turn(numbers.ctypes.data + start * row, row, row, out.ctypes.data)
    else:
        for n in range(OUTPUTS):
            given = numbers[min(start + n, len(numbers) - 1)]
            for group in range(groups):
                out[group, n] = given[group]


@jit
def _origins(zero, scale, start, grouped, top, unit, more, rest):
    """What codes below `top` of the outputs from `start` on become a panel with: `unit`, `more`
    [groups, 32]; `rest` [32], what a row's sum is multiplied with besides."""
    _by_group(zero, start, more)
    if grouped:
        _by_group(scale, start, unit)
        factors, numbers = unit.reshape(unit.size), more.reshape(more.size)
        for n in range(zero.shape[1] * OUTPUTS):
            numbers[n] = -(numbers[n] + top) * factors[n]
            factors[n] *= top
        return
    for n in range(OUTPUTS):
        origin = more[0, n]
        near = min(max(np.rint(origin), _float(0)), _float(255))
        unit[0, n], more[0, n], rest[n] = top, -near - top, near - origin


@jit
def _codes(packed, start, widths, columns, known):
    """Codes of `OUTPUTS` rows of `packed` from `start` on to words of a panel, in `known`, which is
    what `vnni_numba.scratch` gives; those of one plane stay in their bytes."""
    lines, planes, codes = known
    if len(widths) > 1:
        codes_panel(packed, start, widths, columns, lines, planes, codes)
        return
    base, phases = gather(packed, start, lines), 8 // widths[0]
    turn(base, packed.shape[1], 4 * blocks_of(columns, phases), codes.ctypes.data)


@jit
def _panel(codes, low, high, parts, flip, size, grouped, unit, more, panel):
    """Words of codes from `low` to `high`, each of `parts` phases, to `panel` bf16 [pairs, 32, 2];
    where they are `grouped`, `size` of them belong to a group, and `low` begins one."""
    width, step = 8 // parts, 8 * OUTPUTS * parts
    count = size if grouped else high - low
    whole, mask = (high - low) // count, ((1 << width) - 1) << (DIGITS - width)
    begin, first = low, low // size if grouped else 0
    for groups, words in ((whole, count), (1, (high - low) % count)):
        given = codes.ctypes.data + 4 * OUTPUTS * begin
        target = panel.ctypes.data + step * (begin - low)
        u, v = unit[first:].ctypes.data, more[first:].ctypes.data
        for part in range(parts):
            out, up = target + 8 * OUTPUTS * part, DIGITS - (part + 1) * width + 32
            if grouped:
                _widen_rounded(given, groups, words, flip, mask, up, u, v, out, step)
            else:
                _widen_exactly(given, groups, words, flip, mask, up, u, v, out, step)
        begin, first = begin + whole * count, first + whole


@jit
def _whole_zeros(zero):
    """Whether all of `zero` [n, 1] are codes."""
    whole = True
    for n in range(len(zero)):
        origin = zero[n, 0]
        whole &= origin >= 0 and origin <= 255 and np.rint(origin) == origin
    return whole


@jit
def _write(sums, first, rest, units, bias, start, wide, ends, spare, out, place):
    """What `sums` [rows, 32] of the `wide` outputs from `start` on become, to `out` [M, N] from
    column `place` on: see `vdpbf16_numba.finish`. `ends` fp32 [2, 32], ones and zeros where there
    are no `units` and no `bias`, and `spare` int16 [M, 32] are scratch."""
    unit, more = ends[0], ends[1]
    if len(units):
        for n in range(wide):
            unit[n] = units[start + n]
    if len(bias):
        for n in range(wide):
            more[n] = bias[start + n]
    whole = wide == OUTPUTS
    target, row = (out[0, place:], out.shape[1]) if whole else (spare[0], OUTPUTS)
    finish(
        sums.ctypes.data, len(out), first.ctypes.data, rest.ctypes.data, unit.ctypes.data,
        more.ctypes.data, target.ctypes.data, 2 * row,
    )  # fmt: skip
    if not whole:
        for m in range(len(out)):
            for n in range(wide):
                out[m, place + n] = spare[m, n]


@jit
def product(x, packed, signed, widths, columns, size, zero, scale, units, bias, out, place):
    """Rows `x` int16 of bf16 [M, columns] times a weight [n, columns]: `out`, the same, [M, N] from
    column `place` on.

    `zero`, `scale` fp32 [1 or n, groups], one for each `size` columns. What comes out is multiplied
    by `units` [n] where they are not empty, and then the weight has no groups; `bias` [n] is added.
    """
    grouped, groups, phases = len(units) == 0, zero.shape[1], 8 // widths[-1]
    lines, planes, codes, row = scratch(packed, widths, columns)
    known, steps = (lines, planes, codes), row // 2
    chunk = max(_FEWEST, min(_MOST, _KEPT // (2 * row)))
    chunk = -(-len(x) // -(-len(x) // chunk))
    padded = -(-chunk // _EACH) * _EACH + _LOW  # the height of the tiles of a chunk, at most
    straight = np.zeros((LANES, -(-row // 32) * 32), _short)
    left = np.empty(2 * steps * padded + 2 * LANES * (LANES + 1), _short)
    order, line, spare = (
        _order(phases),
        np.empty(columns, _float),
        np.empty((chunk, OUTPUTS), _short),
    )
    ends = np.ones((2, OUTPUTS), _float)
    ends[1] = 0
    sums, first = np.zeros((padded, OUTPUTS), _float), np.zeros(chunk, _float)
    parts, flip = phases if len(widths) == 1 else 1, 0x80808080 if signed else 0
    words, each, top = row // (4 * parts), size // (4 * parts), _float(1 << 8 // parts)
    piece = -(-words // -(-row // _PIECE))
    piece = -(-piece // each) * each if grouped else piece
    panel = np.empty(piece * 4 * parts * OUTPUTS, _short)
    shape = (-(-groups // LANES) * LANES, OUTPUTS)
    unit, more, rest = np.empty(shape, _float), np.empty(shape, _float), np.zeros(OUTPUTS, _float)
    uneven = not grouped and not _whole_zeros(zero)
    for begin in range(0, len(x), chunk):
        some = x[begin : begin + chunk]
        count = len(some)
        _pack(some, steps, order, straight, left)
        if uneven:
            for m in range(count):
                load(some[m], True, line)
                first[m] = _total(line)
        for start in range(0, len(packed), OUTPUTS):
            _origins(zero, scale, start, grouped, top, unit, more, rest)
            _codes(packed, start, widths, columns, known)
            ahead, fetched = following(packed, start + OUTPUTS)
            for low in range(0, words, piece):
                high = min(low + piece, words)
                _panel(codes, low, high, parts, flip, each, grouped, unit, more, panel)
                _multiply(
                    left, count, steps, 2 * parts * low, 2 * parts * high, panel, sums, low == 0,
                    ahead, fetched if low == 0 else 0,
                )  # fmt: skip
            wide = min(OUTPUTS, len(packed) - start)
            _write(
                sums, first, rest, units, bias, start, wide, ends, spare,
                out[begin : begin + count], place + start,
            )  # fmt: skip
