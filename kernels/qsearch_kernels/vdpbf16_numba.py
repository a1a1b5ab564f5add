"""Tiles of bf16 in `vdpbf16ps` (AVX512-BF16), and what goes into them and comes out, as intrinsics
that numba compiles.

`vdpbf16ps` adds products of two neighbouring columns to each of 16 sums of fp32: a panel of a
weight is bf16 [pairs of columns, 32 outputs, 2], a tile of rows [pairs of columns, rows, 2].
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .tiles_numba import transposed

LANES, OUTPUTS = 16, 32  # of a vector of 32 bits, of a panel
DIGITS = 23  # bits of an fp32 number behind its first
_ONE = 0x3F800000  # 1 in fp32
_LINE = 64  # bytes of a vector

_whole, _place = ir.IntType(64), ir.IntType(32)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]  # llvmlite has none
    null, intrinsic_name = "0.0", "bf16"

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()
_sums, _words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_place, LANES)
_halves, _pairs = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(_BFloat(), 2 * LANES)


def _at(builder, place, form):
    return builder.inttoptr(place, form.as_pointer())


def _declared(builder, name, result, given):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, given), name)


def _everywhere(builder, number):
    form = ir.VectorType(number.type, LANES)
    first = builder.insert_element(ir.Constant(form, ir.Undefined), number, _place(0))
    return builder.shuffle_vector(first, first, ir.Constant(_words, [0] * LANES))


def _constant(number):
    return ir.Constant(_words, [number] * LANES)


def _both(builder, place, form=_sums):
    """The two vectors of what belongs to the outputs of a panel."""
    places = (place, builder.add(place, _whole(_LINE)))
    return [builder.load(_at(builder, p, form), align=4) for p in places]


def tile(rows):
    """An intrinsic that multiplies `rows` rows with a panel: sums to `c`, added to what is there
    unless `fresh`.

    `a` is the address of pairs of columns [steps, rows], `b` of a panel [steps, 32], `c` of sums
    fp32 [rows, 32]. `ahead` is the address of what comes next, `rate` how many bytes of it belong
    to one step: it is fetched to the second cache.
    """

    @intrinsic
    def add_tile(typing, a, b, steps, c, fresh, ahead, rate):
        def generate(context, builder, signature, arguments):
            a, b, steps, c, fresh, ahead, rate = arguments
            multiply = _declared(
                builder, "llvm.x86.avx512bf16.dpbf16ps.512", _sums, [_sums, _pairs, _pairs]
            )
            byte = ir.IntType(8)
            fetch = _declared(
                builder, "llvm.prefetch.p0", ir.VoidType(), [byte.as_pointer(), *[_place] * 3]
            )
            zeros = ir.Constant(_sums, [0.0] * LANES)
            before = builder.block
            loop, done = (builder.append_basic_block(name) for name in ("products", "done"))
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(_whole)
            held = [builder.phi(_sums) for _ in range(2 * rows)]
            panel = builder.add(b, builder.mul(step, _whole(4 * OUTPUTS)))
            weights = _both(builder, panel, _pairs)
            line, made = builder.add(a, builder.mul(step, _whole(4 * rows))), []
            for row in range(rows):
                pair = builder.load(
                    _at(builder, builder.add(line, _whole(4 * row)), _place), align=4
                )
                x = builder.bitcast(_everywhere(builder, pair), _pairs)
                for total, w in zip(held[2 * row : 2 * row + 2], weights, strict=True):
                    made.append(builder.call(multiply, [total, w, x]))
            place = builder.add(ahead, builder.mul(step, rate))
            builder.call(fetch, [_at(builder, place, byte), *(_place(v) for v in (0, 2, 1))])
            following = builder.add(step, _whole(1))
            step.add_incoming(_whole(0), before)
            step.add_incoming(following, loop)
            for total, later in zip(held, made, strict=True):
                total.add_incoming(zeros, before)
                total.add_incoming(later, loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
            builder.position_at_end(done)
            first = builder.icmp_signed("!=", fresh, _whole(0))
            for row in range(rows):
                for half in range(2):
                    target = _at(builder, builder.add(c, _whole(_LINE * half)), _sums)
                    there = builder.select(first, zeros, builder.load(target, align=4))
                    builder.store(builder.fadd(there, made[2 * row + half]), target, align=4)
                c = builder.add(c, _whole(4 * OUTPUTS))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return add_tile


def widener(exact):
    """An intrinsic that makes bf16 [2, 32, 2] of each of words [groups, count, 32, 4 bytes] of a
    panel, of their codes of one phase: (1 + code / 2**width) * unit + more, of fp32 `unit` and
    `more` [groups, 32]; `exact` where bf16 holds the results. `mask` is where an fp32 number's
    digits begin, and bits turned left by `up` bring the first byte's codes there. `flip` is a word
    whose bits are turned over first; `step` bytes are from one result to the next."""

    @intrinsic
    def widen(typing, given, groups, count, flip, mask, up, unit, more, out, step):
        def generate(context, builder, signature, arguments):
            given, groups, count, flip, mask, up, unit, more, out, step = arguments
            multiply = _declared(builder, "llvm.fma.v16f32", _sums, [_sums] * 3)
            narrow = _declared(
                builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _pairs, [_sums, _sums]
            )
            rotate = _declared(builder, "llvm.fshl.v16i32", _words, [_words] * 3)
            flip, mask, up = (
                _everywhere(builder, builder.trunc(v, _place)) for v in (flip, mask, up)
            )
            ups = [builder.sub(up, _constant(8 * q)) for q in range(4)]
            order = [i // 2 + LANES * (i % 2) for i in range(2 * LANES)]
            order = ir.Constant(ir.VectorType(_place, 2 * LANES), order)

            def pairs(numbers):
                if exact:
                    first, second = (builder.bitcast(n, _words) for n in numbers)
                    return builder.or_(builder.lshr(first, _constant(16)), second)
                made = builder.bitcast(builder.call(narrow, [numbers[1], numbers[0]]), _halves)
                return builder.shuffle_vector(made, made, order)

            def one(place, factors, addends):
                source = builder.add(given, builder.mul(place, _whole(4 * OUTPUTS)))
                target = builder.add(out, builder.mul(place, step))
                for half, word in enumerate(_both(builder, source, _words)):
                    word, numbers = builder.xor(word, flip), []
                    for to_left in ups:
                        code = builder.and_(builder.call(rotate, [word, word, to_left]), mask)
                        number = builder.bitcast(builder.or_(code, _constant(_ONE)), _sums)
                        scaled = [number, factors[half], addends[half]]
                        numbers.append(builder.call(multiply, scaled))
                    for q in range(0, 4, 2):
                        there = builder.add(target, _whole(2 * OUTPUTS * q + _LINE * half))
                        made = pairs(numbers[q : q + 2])
                        builder.store(made, _at(builder, there, made.type), align=4)

            with cgutils.for_range(builder, groups, intp=_whole) as group:
                place = builder.mul(group.index, _whole(4 * OUTPUTS))
                scaling = [_both(builder, builder.add(v, place)) for v in (unit, more)]
                first = builder.mul(group.index, count)
                with cgutils.for_range(builder, count, intp=_whole) as word:
                    one(builder.add(first, word.index), *scaling)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return widen


@intrinsic
def across(typing, given, row, order, out, step):
    """32 columns of 16 rows of bf16, `row` bytes apart, in `order` int16 [32], to pairs of columns
    [16, rows], `step` bytes from one to the next: what lies beyond a step becomes anything."""

    def generate(context, builder, signature, arguments):
        given, row, order, out, step = arguments
        permute = _declared(builder, "llvm.x86.avx512.permvar.hi.512", _halves, [_halves] * 2)
        order, lines = builder.load(_at(builder, order, _halves), align=2), []
        for _ in range(LANES):
            line = builder.load(_at(builder, given, _halves), align=2)
            lines.append(builder.bitcast(builder.call(permute, [line, order]), _words))
            given = builder.add(given, row)
        for line in transposed(builder, lines):
            builder.store(line, _at(builder, out, _words), align=4)
            out = builder.add(out, step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def finish(typing, sums, rows, first, rest, unit, more, out, out_row):
    """bf16 [rows, 32] of (sums + first * rest) * unit + more; `out_row` bytes a row."""

    def generate(context, builder, signature, arguments):
        sums, rows, first, rest, unit, more, out, out_row = arguments
        multiply = _declared(builder, "llvm.fma.v16f32", _sums, [_sums] * 3)
        narrow = _declared(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _pairs, [_sums] * 2)
        numbers = [_both(builder, v) for v in (rest, unit, more)]
        with cgutils.for_range(builder, rows, intp=_whole) as loop:
            total = builder.add(first, builder.mul(loop.index, _whole(4)))
            total = builder.load(_at(builder, total, ir.FloatType()), align=4)
            total, made = _everywhere(builder, total), []
            found = _both(builder, builder.add(sums, builder.mul(loop.index, _whole(4 * OUTPUTS))))
            for number, before, factor, addend in zip(found, *numbers, strict=True):
                number = builder.call(multiply, [total, before, number])
                made.append(builder.call(multiply, [number, factor, addend]))
            line = builder.call(narrow, [made[1], made[0]])
            target = builder.add(out, builder.mul(loop.index, out_row))
            builder.store(line, _at(builder, target, _pairs), align=2)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate
