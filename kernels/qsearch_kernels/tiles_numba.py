"""A matrix product in tiles that stay in registers, as numba compiles it for x86 cores with AVX2.

Of fp32 with fused multiply and add; of int16 with `vpmaddwd`, which multiplies 16 pairs and adds
neighbours in 32 bits, where nothing saturates: products of bytes, widened to 16 bits, are exact,
and 1.6 times as many a cycle as of fp32. A tile is six rows by two vectors of outputs: twelve sums
in sixteen registers. The weight comes as a panel of so many outputs, transposed: each number of a
row, or each pair of 16 bits, is multiplied with all of them at once.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit

ROWS, OUTPUTS = 6, 16  # of a tile
#: columns that rows are multiples of
LANES = 16
_STEP = 64  # bytes of a panel that belong to four bytes of a row
_PIECE = 1280  # bytes of a row at a time: as much of a panel, and of six rows, fit the first cache

_whole, _place = ir.IntType(64), ir.IntType(32)


def _at(builder, place, form):
    return builder.inttoptr(place, form.as_pointer())


def _shuffled(builder, u, v, places):
    return builder.shuffle_vector(u, v, ir.Constant(ir.VectorType(_place, len(places)), places))


@intrinsic
def _add_tile(typing, like, a, row, b, length, c, c_row):
    """Adds a tile of products of `length` bytes of rows to `c`.

    `a`, `b`, `c` are addresses of rows, of a panel and of sums; `row`, `c_row` are bytes from one
    row to the next; `like` is an array of what is multiplied, int16 (added in int32) or fp32.
    """
    real = like.dtype == types.float32

    def generate(context, builder, signature, arguments):
        _, a, row, b, length, c, c_row = arguments
        one = ir.FloatType() if real else ir.IntType(32)
        sums, pairs = ir.VectorType(one, 8), ir.VectorType(ir.IntType(16), 16)
        name, form = (
            ("llvm.fmuladd.v8f32", [sums] * 3) if real else ("llvm.x86.avx2.pmadd.wd", [pairs] * 2)
        )
        multiply = cgutils.get_or_insert_function(builder.module, ir.FunctionType(sums, form), name)
        add = builder.fadd if real else builder.add

        def accumulated(total, x, w):
            if real:
                return builder.call(multiply, [x, w, total])
            return add(total, builder.call(multiply, [x, w]))

        def everywhere(number):
            empty = ir.Constant(sums, ir.Undefined)
            first = builder.insert_element(empty, number, ir.Constant(_place, 0))
            made = _shuffled(builder, first, empty, [0] * 8)
            return made if real else builder.bitcast(made, pairs)

        def vectors(place):
            following = builder.add(place, ir.Constant(_whole, 32))
            return [_at(builder, p, sums if real else pairs) for p in (place, following)]

        lines = [a]
        for _ in range(ROWS - 1):
            lines.append(builder.add(lines[-1], row))
        before = builder.block
        loop, done = (builder.append_basic_block(name) for name in ("dots", "done"))
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_whole)
        held = [[builder.phi(sums), builder.phi(sums)] for _ in lines]
        panel = builder.add(b, builder.mul(step, ir.Constant(_whole, _STEP // 4)))
        weights, made = [builder.load(p, align=2) for p in vectors(panel)], []
        for line, own in zip(lines, held, strict=True):
            number = builder.load(_at(builder, builder.add(line, step), one), align=2)
            x = everywhere(number)
            made.append([accumulated(t, x, w) for t, w in zip(own, weights, strict=True)])
        following = builder.add(step, ir.Constant(_whole, 4))
        step.add_incoming(ir.Constant(_whole, 0), before)
        step.add_incoming(following, loop)
        for own, new in zip(held, made, strict=True):
            for total, later in zip(own, new, strict=True):
                total.add_incoming(ir.Constant(sums, [0.0 if real else 0] * 8), before)
                total.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, length), loop, done)
        builder.position_at_end(done)
        for new in made:
            for place, total in zip((0, 32), new, strict=True):
                target = _at(builder, builder.add(c, ir.Constant(_whole, place)), sums)
                builder.store(add(builder.load(target, align=4), total), target, align=4)
            c = builder.add(c, c_row)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 6), generate


@intrinsic
def _transpose(typing, given, row, out):
    """Transposes 8 x 8 numbers of 32 bits, from rows that lie `row` bytes apart to a panel's."""

    def generate(context, builder, signature, arguments):
        given, row, out = arguments
        eight, lines = ir.VectorType(ir.FloatType(), 8), []
        for _ in range(8):
            lines.append(builder.load(_at(builder, given, eight), align=4))
            given = builder.add(given, row)
        for apart, low, high in (
            (4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
            (2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
            (1, [0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]),
        ):  # halves change places between lines that are so far apart
            for i in range(8):
                if not i & apart:
                    u, v = lines[i], lines[i + apart]
                    lines[i] = _shuffled(builder, u, v, low)
                    lines[i + apart] = _shuffled(builder, u, v, high)
        for line in lines:
            builder.store(line, _at(builder, out, eight), align=4)
            out = builder.add(out, ir.Constant(_whole, _STEP))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@jit
def multiply(a, b, panel, c, place):
    """`c` [M, N] += `a` [M, K] times `b` [OUTPUTS, K], from column `place` of `c` on.

    `a` and `b` are int16 and `c` is int32, or all are fp32; M is a multiple of `ROWS`, K of
    `LANES`. `panel`, as large as `b`, is scratch.
    """
    row, c_row = a.shape[1] * a.itemsize, c.shape[1] * c.itemsize
    x, given, w = a.ctypes.data, b.ctypes.data, panel.ctypes.data
    for n in range(0, OUTPUTS, 8):
        for k in range(0, row, 32):
            _transpose(given + n * row + k, row, w + k * OUTPUTS + n * 4)
    y = c.ctypes.data + place * c.itemsize
    pieces = -(-row // _PIECE)
    piece = -(-row // (pieces * 4)) * 4
    for first in range(0, row, piece):
        length = min(piece, row - first)
        for m in range(0, len(a), ROWS):
            _add_tile(
                a, x + m * row + first, row, w + first * OUTPUTS, length, y + m * c_row, c_row
            )
