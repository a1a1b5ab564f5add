"""A few rows of fp32 times a packed weight whose codes become numbers in registers, as numba
compiles it for cores with vectors of 8 or 16 numbers.

Where rows are few, widening the weight through memory takes as long as multiplying. Here a vector
of codes is shifted, masked, converted and multiplied with eight rows at once, whose numbers lie in
the order in which they are needed. No code is shuffled: with P codes in a byte of the narrowest
plane (`layout.py`), position q of a row is the columns P q to P q + P - 1, whose bits lie together
in each plane, in one byte or in two or four; a vector takes the same phase of so many positions.
The last vector of a row ends with the row, and rows have zeros where it overlaps the one before.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .floats_numba import load, store
from .jit import jit
from .layout import planes
from .widen_numba import every

_float = np.float32
_whole, _short, _real = ir.IntType(64), ir.IntType(32), ir.FloatType()
_BLOCK, _WIDE = 32, 256  # outputs at a time: whose codes stay in the first cache, whose sums do
_FIRST, _SECOND = 24 * 2**10, 2**18  # bytes of rows at a time that stay in the two caches


def _at(builder, place, form):
    return builder.inttoptr(place, form.as_pointer())


def _added_up(builder, vectors):
    """The sums of the lanes of each vector, as one vector; there is a power of two of each."""
    lanes, apart = vectors[0].type.count, vectors[0].type.count // 2

    def halves(u, v, count):
        for half in (0, 1):
            places = [p for p in range(count) if p // apart % 2 == half]
            kind = ir.VectorType(_short, len(places))
            yield builder.shuffle_vector(u, v, ir.Constant(kind, places))

    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(*halves(u, v, 2 * lanes)) for u, v in pairs]
        apart //= 2
    (found,) = vectors
    while apart:
        empty = ir.Constant(found.type, ir.Undefined)
        found = builder.fadd(*halves(found, empty, found.type.count))
        apart //= 2
    return found


def _loaded(builder, line, starts, position, bits, lanes):
    """Of each plane of a row that begins at `line`: integers with the bits of `lanes` positions,
    the plane's width, and the place of its lowest bit in a code."""
    integers, phases, shift = ir.VectorType(_short, lanes), 8 // planes(bits)[-1], 0
    for start, width in zip(starts, planes(bits), strict=True):
        stride = phases * width // 8
        place = builder.add(builder.add(line, start), builder.mul(position, _whole(stride)))
        form = ir.VectorType(ir.IntType(8 * stride), lanes)
        found = builder.load(_at(builder, place, form), align=1)
        if stride < 4:
            found = (builder.sext if bits == 8 else builder.zext)(found, integers)
        yield found, width, shift
        shift += width


def _code(builder, loaded, phase):
    """The codes of one phase as fp32, of what `_loaded` gives."""
    code, integers = None, loaded[0][0].type
    for found, width, shift in loaded:
        part, down = found, phase * width - shift
        if width < 8:
            if down:
                move = builder.lshr if down > 0 else builder.shl
                part = move(part, ir.Constant(integers, [abs(down)] * integers.count))
            mask = ((1 << width) - 1) << shift
            part = builder.and_(part, ir.Constant(integers, [mask] * integers.count))
        code = part if code is None else builder.or_(code, part)
    return builder.sitofp(code, ir.VectorType(_real, integers.count))


@intrinsic(prefer_literal=True)
def _add(
    typing, bits, lanes, rows, outputs, grouped, x, codes, row, n, final, columns, begin, end, last,
    zero, zero_row, scale, scale_row, size, sums,
):  # fmt: skip
    """Adds to `sums` fp32 [outputs, rows] the products of rows with `outputs` rows of the weight
    from `n` on (the row `final` in place of later ones), at the positions from `begin` to `end`.

    `x` is the address of the rows' numbers [positions / lanes, phases, rows, lanes] from `begin`
    on; `codes`, `zero`, `scale` those of the weight, whose rows lie `row`, `zero_row`, `scale_row`
    bytes apart; the two have a number for each `size` positions. No vector of codes begins after
    the position `last`. Without `grouped` there is no scale. Of several rows the weights are less
    their zero and scaled; of a single one, where that would take as long as the product, sums are.
    """
    kinds = (bits, lanes, rows, outputs, grouped)
    width, wide, tall, many, scaled = (kind.literal_value for kind in kinds)

    def generate(context, builder, signature, arguments):
        (
            x, codes, row, n, final, columns, begin, end, last, zero, zero_row, scale, scale_row,
            size, sums,
        ) = arguments[len(kinds) :]  # fmt: skip
        numbers, phases, single = ir.VectorType(_real, wide), 8 // planes(width)[-1], tall == 1
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(numbers, [numbers] * 3), f"llvm.fmuladd.v{wide}f32"
        )
        fetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[_short] * 3]),
            "llvm.prefetch.p0",
        )
        zeros = ir.Constant(numbers, [0.0] * wide)

        def multiplied(a, b, total):
            return builder.call(fused, [a, b, total])

        def everywhere(place):
            number = builder.load(_at(builder, place, _real), align=4)
            empty = ir.Constant(numbers, ir.Undefined)
            first = builder.insert_element(empty, number, ir.Constant(_short, 0))
            return builder.shuffle_vector(
                first, empty, ir.Constant(ir.VectorType(_short, wide), [0] * wide)
            )

        def least(a, b):
            return builder.select(builder.icmp_signed("<", a, b), a, b)

        lines, origins, units = [], [], []
        for place in range(many):
            own = least(builder.add(n, _whole(place)), final)
            lines.append(builder.add(codes, builder.mul(own, row)))
            origins.append(builder.add(zero, builder.mul(own, zero_row)))
            units.append(builder.add(scale, builder.mul(own, scale_row)))
        starts = [_whole(0)]
        for each in planes(width)[:-1]:
            length = builder.add(builder.mul(columns, _whole(each)), _whole(7))
            starts.append(builder.add(starts[-1], builder.lshr(length, _whole(3))))
        after = builder.add(codes, builder.mul(builder.add(n, _whole(many)), row))
        number, before = builder.sdiv(begin, size), builder.block
        group, dots, finish, done = (
            builder.append_basic_block(name) for name in ("group", "dots", "finish", "done")
        )
        builder.branch(group)

        builder.position_at_end(group)
        first, place, given = builder.phi(_whole), builder.phi(_whole), builder.phi(_whole)
        totals = [builder.phi(numbers) for _ in range(tall * many)]
        stop = least(builder.mul(builder.add(place, _whole(1)), size), end)

        def of_group(addresses):
            byte = builder.mul(place, _whole(4))
            return [everywhere(builder.add(address, byte)) for address in addresses]

        less, times = ([], []) if single else (of_group(origins), of_group(units) if scaled else [])
        builder.branch(dots)

        builder.position_at_end(dots)
        step, source = builder.phi(_whole), builder.phi(_whole)
        held = [builder.phi(numbers) for _ in range(tall * many + single)]
        made, position = list(held), least(step, last)
        if single:  # a core does not foresee short rows: those of the next outputs are fetched
            each = many * phases * width // 8  # bytes of a position
            ahead = builder.add(after, builder.mul(step, _whole(each)))
            for more in range(0, wide * each, 64):
                where = _at(builder, builder.add(ahead, _whole(more)), ir.IntType(8))
                builder.call(fetch, [where, *(_short(v) for v in (0, 3, 1))])

        def left(phase, m=0):
            offset = _whole(4 * wide * (phase * tall + m))
            return builder.load(_at(builder, builder.add(source, offset), numbers), align=4)

        taken = (list(_loaded(builder, line, starts, position, width, wide)) for line in lines)
        if single:  # output by output, or registers run short
            xs = [left(phase) for phase in range(phases)]
            for output, own in enumerate(taken):
                for phase, x_ in enumerate(xs):
                    made[output] = multiplied(x_, _code(builder, own, phase), made[output])
            for x_ in xs:
                made[-1] = builder.fadd(made[-1], x_)
        else:
            taken = list(taken)
            for phase in range(phases):
                weights = [_code(builder, own, phase) for own in taken]
                weights = [builder.fsub(w, own) for w, own in zip(weights, less, strict=True)]
                if scaled:
                    weights = [builder.fmul(w, own) for w, own in zip(weights, times, strict=True)]
                for m in range(tall):
                    x_ = left(phase, m)
                    for output, weight in enumerate(weights):
                        own = output * tall + m
                        made[own] = multiplied(x_, weight, made[own])
        following = builder.add(step, _whole(wide))
        beyond = builder.add(source, _whole(4 * wide * phases * tall))
        builder.cbranch(builder.icmp_signed("<", following, stop), dots, finish)

        builder.position_at_end(finish)
        later, more = made, builder.add(place, _whole(1))
        if single:
            later, units = [], of_group(units) if scaled else []
            for output, origin in enumerate(of_group(origins)):
                part = builder.fsub(made[output], builder.fmul(origin, made[-1]))
                total = totals[output]
                later.append(
                    multiplied(part, units[output], total) if scaled else builder.fadd(part, total)
                )
        builder.cbranch(builder.icmp_signed("<", following, end), group, done)

        for phi, entry, new in (
            (first, begin, following),
            (place, number, more),
            (given, x, beyond),
            *((total, zeros, new) for total, new in zip(totals, later, strict=True)),
        ):
            phi.add_incoming(entry, before)
            phi.add_incoming(new, finish)
        for phi, entry, new in (
            (step, first, following),
            (source, given, beyond),
            *zip(held, [zeros] * len(held) if single else totals, made, strict=True),
        ):
            phi.add_incoming(entry, group)
            phi.add_incoming(new, dots)
        builder.position_at_end(done)
        found = _added_up(builder, later)
        target = _at(builder, sums, found.type)
        builder.store(builder.fadd(builder.load(target, align=4), found), target, align=4)
        return context.get_dummy_value()

    return types.void(*kinds, *[types.intp] * 15), generate


@jit
def _height(left, rows):
    """Rows of the tile where so many of all are left."""
    return 1 if rows == 1 else 4 if left <= 4 else 8


@jit
def _arranged(x, short, phases, each, lanes, given, line, out):
    """Rows `x` [m, columns] as `_add` takes them, and rows of zeros after them: to `out` fp32
    [positions / lanes, phases, rows, lanes]; `given` [columns], `line` [each] are scratch."""
    columns = len(given)
    if len(x) < out.shape[2]:
        out[:] = 0
    for m in range(len(x)):
        load(x[m], short, given)
        for phase in range(phases):
            every(given[min(phase, columns) :], phases, line)
            for step in range(len(out)):
                target, begin = out[step, phase, m], step * lanes
                if begin + lanes <= each:
                    numbers = line[begin : begin + lanes]
                    for k in range(len(target)):
                        target[k] = numbers[k]
                else:
                    target[:] = 0
                    target[lanes - (each - begin) :] = line[begin:]


@jit
def _finished(sums, units, bias, short, line, out, place):
    """Sums [outputs, rows] times `units` and with `bias`, to `out` [m, N] from column `place` on;
    `line` [outputs] is scratch."""
    width = 1 if short else 2
    for m in range(len(out)):
        for n in range(len(line)):
            line[n] = sums[n, m]
        if len(units):
            for n in range(len(line)):
                line[n] *= units[n]
        if len(bias):
            for n in range(len(line)):
                line[n] += bias[n]
        store(line, short, out[m, width * place : width * (place + len(line))])


@functools.cache
def product(bits, lanes, grouped):
    """The compiled product for codes of so many bits (8: bytes with a sign) and vectors of so many
    numbers, of weights with `grouped` scales or without."""
    phases = 8 // planes(bits)[-1]
    # outputs at a time of eight rows, of four, of one: what belongs to them fits the registers
    by_8, by_4, by_1 = lanes // 8, 2 if grouped else lanes // 4, 8

    @jit
    def multiplied(x, short, packed, columns, size, zero, scale, units, bias, out, place):
        """`out` [M, N] from column `place` on = rows `x` [M, columns] times the weight `packed`
        uint8 [n, row bytes], of `lanes` * P columns at least.

        `x` and `out` are int16, of bf16 where `short`, else of fp32. `zero`, `scale` fp32 [1 or n,
        groups] are for `size` positions each, a multiple of `lanes` where there are several. What
        comes out is multiplied by `units` [n]; `bias` [n] is added; where they are empty, nothing.
        """
        outputs, each = len(packed), -(-columns // phases)
        steps = -(-each // lanes)
        end, last, final = steps * lanes, each - lanes, outputs - 1
        if zero.shape[1] == 1:
            size = end
        zero_row = 4 * zero.shape[1] if len(zero) > 1 else 0
        scale_row = 4 * scale.shape[1] if len(scale) > 1 else 0
        given, line = np.empty(columns, _float), np.empty(each, _float)
        done = np.empty(_WIDE, _float)
        codes, row = packed.ctypes.data, packed.shape[1]
        origin, unit = zero.ctypes.data, scale.ctypes.data
        tile = 8 * phases * end
        tiles = min(-(-len(x) // 8), max(1, _SECOND // (4 * tile)))
        spare = np.empty(tiles * tile + 16, _float)
        skip = -spare.ctypes.data % 64 // 4  # to a line of the cache
        numbers = spare[skip : skip + tiles * tile]
        sums = np.empty(tiles * 8 * _WIDE, _float)
        for begin in range(0, len(x), 8 * tiles):
            count = min(8 * tiles, len(x) - begin)
            for t in range(-(-count // 8)):
                tall = _height(count - 8 * t, len(x))
                left = numbers[t * tile :][: tall * phases * end]
                own = x[begin + 8 * t : min(begin + 8 * t + 8, begin + count)]
                _arranged(
                    own, short, phases, each, lanes, given, line,
                    left.reshape(steps, phases, tall, lanes),
                )  # fmt: skip
            for wide in range(0, outputs, _WIDE):
                beyond = min(wide + _WIDE, outputs)
                sums[:] = 0
                for start in range(wide, beyond, _BLOCK):
                    stop = min(start + _BLOCK, beyond)
                    for t in range(-(-count // 8)):
                        tall = _height(count - 8 * t, len(x))
                        piece = max(1, _FIRST // (4 * tall * phases * lanes)) * lanes
                        if size < piece:
                            piece = piece // size * size
                        for first in range(0, end, piece):
                            until = min(first + piece, end)
                            left = numbers.ctypes.data + 4 * (t * tile + first * tall * phases)
                            target = sums.ctypes.data + 4 * (t * 8 * _WIDE - wide * tall)
                            if tall == 8:
                                for n in range(start, stop, by_8):
                                    _add(
                                        bits, lanes, 8, by_8, grouped, left, codes, row, n, final,
                                        columns, first, until, last, origin, zero_row, unit,
                                        scale_row, size, target + 32 * n,
                                    )  # fmt: skip
                            elif tall == 4:
                                for n in range(start, stop, by_4):
                                    _add(
                                        bits, lanes, 4, by_4, grouped, left, codes, row, n, final,
                                        columns, first, until, last, origin, zero_row, unit,
                                        scale_row, size, target + 16 * n,
                                    )  # fmt: skip
                            else:
                                for n in range(start, stop, by_1):
                                    _add(
                                        bits, lanes, 1, by_1, grouped, left, codes, row, n, final,
                                        columns, first, until, last, origin, zero_row, unit,
                                        scale_row, size, target + 4 * n,
                                    )  # fmt: skip
                n = slice(wide, beyond)
                for t in range(-(-count // 8)):
                    tall, m = _height(count - 8 * t, len(x)), begin + 8 * t
                    made = sums[t * 8 * _WIDE :][: tall * _WIDE].reshape(_WIDE, tall)
                    _finished(
                        made, units[n], bias[n], short, done[: beyond - wide],
                        out[m : min(m + 8, begin + count)], place + wide,
                    )  # fmt: skip

    return multiplied
