"""A matrix product in tiles that stay in registers, as numba compiles it for x86 cores.

Of fp32 with fused multiply and add; of int16 with `vpmaddwd`, which multiplies 16 pairs and adds
neighbours in 32 bits, where nothing saturates: products of bytes, widened to 16 bits, are exact,
and 1.6 times as many a cycle as of fp32; of bytes with `vpdpbusd` where a core has AVX512-VNNI. A
tile is six rows by two vectors of outputs: twelve sums in sixteen registers (AVX-512 has 32, for
eight rows). The weight comes as a panel of so many outputs, transposed: each number of a row, or
each pair of 16 bits, or four bytes, is multiplied with all of them at once.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit

ROWS, OUTPUTS = 6, 16  # of a tile
#: rows of a tile where there are few: `dots` of a weight that lies as it is; up to so many rows
FEW, _FEW_UP_TO = 4, 24
#: rows of both
BOTH = 12
#: columns that rows are multiples of
LANES = 16
_STEP = 64  # bytes of a panel that belong to four bytes of a row
_LONG = 2**14  # bytes of a row at a time where rows are few
_PIECE = 1280  # bytes of a row at a time: as much of a panel, and of six rows, fit the first cache

_whole, _place = ir.IntType(64), ir.IntType(32)


def _at(builder, place, form):
    return builder.inttoptr(place, form.as_pointer())


def _shuffled(builder, u, v, places):
    return builder.shuffle_vector(u, v, ir.Constant(ir.VectorType(_place, len(places)), places))


def tile(lanes, rows):
    """An intrinsic that adds a tile of products of `length` bytes of rows to `c`: `rows` rows by
    two vectors of `lanes` outputs; where it is `fresh`, what lies there does not count.

    `a`, `b`, `c` are addresses of rows, of a panel and of sums; `row`, `c_row` are bytes from one
    row to the next. `ahead` is the address of what comes next, `rate` how many bytes of it belong
    to one of a row: it is fetched to the second cache where `lanes` are more than 8. `like` is an
    array of what is multiplied: fp32, or int16, uint8 (with int8) and int8 (with uint8), which are
    added in int32.
    """

    @intrinsic
    def add_tile(typing, like, a, row, b, length, c, c_row, fresh, ahead, rate):
        kind = str(like.dtype)

        def generate(context, builder, signature, arguments):
            _, a, row, b, length, c, c_row, fresh, ahead, rate = arguments
            real = kind == "float32"
            one = ir.FloatType() if real else ir.IntType(32)
            sums, pairs = ir.VectorType(one, lanes), ir.VectorType(ir.IntType(16), 2 * lanes)
            name, form = {
                "float32": (f"llvm.fmuladd.v{lanes}f32", [sums] * 3),
                "int16": ("llvm.x86.avx2.pmadd.wd", [pairs] * 2),
                "uint8": (f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", [sums] * 3),
                "int8": (f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", [sums] * 3),
            }[kind]
            multiply = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(sums, form), name
            )
            byte = ir.IntType(8)
            fetch = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [byte.as_pointer(), *[_place] * 3]),
                "llvm.prefetch.p0",
            )
            add = builder.fadd if real else builder.add

            def accumulated(total, x, w):
                if kind == "int16":
                    x, w = (builder.bitcast(v, pairs) for v in (x, w))
                    return add(total, builder.call(multiply, [x, w]))
                if real:
                    return builder.call(multiply, [x, w, total])
                return builder.call(multiply, [total, *((x, w) if kind == "uint8" else (w, x))])

            def everywhere(number):
                empty = ir.Constant(sums, ir.Undefined)
                first = builder.insert_element(empty, number, ir.Constant(_place, 0))
                return _shuffled(builder, first, empty, [0] * lanes)

            def vectors(place):
                following = builder.add(place, ir.Constant(_whole, 4 * lanes))
                return [_at(builder, p, sums) for p in (place, following)]

            lines, targets = [a], vectors(c)
            for _ in range(rows - 1):
                lines.append(builder.add(lines[-1], row))
                c = builder.add(c, c_row)
                targets += vectors(c)
            zeros = ir.Constant(sums, [0.0 if real else 0] * lanes)
            before = builder.block
            loop, done = (builder.append_basic_block(name) for name in ("dots", "done"))
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(_whole)
            held = [builder.phi(sums) for _ in targets]
            panel = builder.add(b, builder.mul(step, ir.Constant(_whole, 2 * lanes)))
            weights, made = [builder.load(p, align=2) for p in vectors(panel)], []
            for place, line in enumerate(lines):
                number = builder.load(_at(builder, builder.add(line, step), one), align=1)
                x, own = everywhere(number), held[2 * place : 2 * place + 2]
                made += [accumulated(t, x, w) for t, w in zip(own, weights, strict=True)]
            if lanes > 8:
                place = builder.add(ahead, builder.mul(step, rate))
                builder.call(fetch, [_at(builder, place, byte), *(_place(v) for v in (0, 2, 1))])
            following = builder.add(step, ir.Constant(_whole, 4))
            step.add_incoming(ir.Constant(_whole, 0), before)
            step.add_incoming(following, loop)
            for total, later in zip(held, made, strict=True):
                total.add_incoming(zeros, before)
                total.add_incoming(later, loop)
            builder.cbranch(builder.icmp_signed("<", following, length), loop, done)
            builder.position_at_end(done)
            first = builder.icmp_signed("!=", fresh, ir.Constant(_whole, 0))
            for target, total in zip(targets, made, strict=True):
                there = builder.select(first, zeros, builder.load(target, align=4))
                builder.store(add(there, total), target, align=4)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 9), generate

    return add_tile


_add_tile = tile(8, ROWS)


def dots(lanes, rows, outputs):
    """An intrinsic that adds the products of `rows` rows with `outputs` rows of a weight, both of
    `length` bytes, to `c`: sums over vectors of `lanes`, which are added up at the end. The weight
    is taken as it lies, which is worth it where so few rows follow that a panel is hardly used.

    `a`, `b`, `c` are addresses; `row`, `b_row`, `c_row` are bytes from one row to the next; `like`
    is an array of what is multiplied, fp32 or int16, which is added in int32.
    """

    @intrinsic
    def add_dots(typing, like, a, row, b, b_row, length, c, c_row):
        real = str(like.dtype) == "float32"

        def generate(context, builder, signature, arguments):
            _, a, row, b, b_row, length, c, c_row = arguments
            one = ir.FloatType() if real else ir.IntType(32)
            sums = ir.VectorType(one, lanes)
            taken = sums if real else ir.VectorType(ir.IntType(16), 2 * lanes)
            form = ir.FunctionType(sums, [sums] * 3 if real else [taken] * 2)
            name = f"llvm.fmuladd.v{lanes}f32" if real else "llvm.x86.avx2.pmadd.wd"
            multiply = cgutils.get_or_insert_function(builder.module, form, name)
            kind = f"fadd.v{lanes}f32" if real else f"add.v{lanes}i32"
            whole = ir.FunctionType(one, [one, sums] if real else [sums])
            reduce = cgutils.get_or_insert_function(
                builder.module, whole, f"llvm.vector.reduce.{kind}"
            )

            def lines(first, apart, count):
                found = [first]
                for _ in range(count - 1):
                    found.append(builder.add(found[-1], apart))
                return found

            left, right = lines(a, row, rows), lines(b, b_row, outputs)
            zeros = ir.Constant(sums, [0.0 if real else 0] * lanes)
            before = builder.block
            loop, done = (builder.append_basic_block(name) for name in ("dots", "done"))
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(_whole)
            held, made = [builder.phi(sums) for _ in range(rows * outputs)], []
            weights, xs = (
                [builder.load(_at(builder, builder.add(p, step), taken), align=4) for p in places]
                for places in (right, left)
            )
            for place, (x, w) in enumerate((x, w) for x in xs for w in weights):
                if real:
                    made.append(builder.call(multiply, [x, w, held[place]]))
                else:
                    made.append(builder.add(held[place], builder.call(multiply, [x, w])))
            following = builder.add(step, ir.Constant(_whole, 4 * lanes))
            step.add_incoming(ir.Constant(_whole, 0), before)
            step.add_incoming(following, loop)
            for total, later in zip(held, made, strict=True):
                total.add_incoming(zeros, before)
                total.add_incoming(later, loop)
            builder.cbranch(builder.icmp_signed("<", following, length), loop, done)
            builder.position_at_end(done)
            for place, total in enumerate(made):
                if real:
                    start = [ir.Constant(one, 0.0), total]
                    number = builder.call(reduce, start, fastmath=("reassoc",))
                else:
                    number = builder.call(reduce, [total])
                target = builder.add(c, ir.Constant(_whole, 4 * (place % outputs)))
                target = _at(builder, target, one)
                add = builder.fadd if real else builder.add
                builder.store(add(builder.load(target, align=4), number), target, align=4)
                if place % outputs == outputs - 1:
                    c = builder.add(c, c_row)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 7), generate

    return add_dots


_add_dots = dots(8, FEW, 2)


def transposed(builder, lines):
    """Vectors of numbers of 32 bits, as many as each has lanes, transposed."""
    lines, lanes = [*lines], len(lines)
    apart = lanes // 2
    while apart:  # halves change places between lines that are so far apart
        low = [i if not i & apart else lanes + i - apart for i in range(lanes)]
        high = [i + apart if not i & apart else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if not i & apart:
                u, v = lines[i], lines[i + apart]
                lines[i] = _shuffled(builder, u, v, low)
                lines[i + apart] = _shuffled(builder, u, v, high)
        apart //= 2
    return lines


def transposer(lanes):
    """An intrinsic that transposes `lanes` x `lanes` numbers of 32 bits, from rows that lie `row`
    bytes apart to a panel's."""

    @intrinsic
    def transpose(typing, given, row, out):
        def generate(context, builder, signature, arguments):
            given, row, out = arguments
            numbers, lines = ir.VectorType(ir.IntType(32), lanes), []
            for _ in range(lanes):
                lines.append(builder.load(_at(builder, given, numbers), align=1))
                given = builder.add(given, row)
            lines = transposed(builder, lines)
            for line in lines:
                builder.store(line, _at(builder, out, numbers), align=4)
                out = builder.add(out, ir.Constant(_whole, 8 * lanes))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), generate

    return transpose


_transpose = transposer(8)


@jit
def multiply(a, count, b, panel, c, place):
    """`c` [M, N] += `a` [M, K] times `b` [OUTPUTS, K] in the first `count` rows at least, from
    column `place` of `c` on. Sums begin anew with each piece of the columns, so that of many
    columns fp32 loses no more than of few.

    `a` and `b` are int16 and `c` is int32, or all are fp32; M is a multiple of `BOTH`, K of
    `LANES`. `panel`, as large as `b`, is scratch.
    """
    row, c_row = a.shape[1] * a.itemsize, c.shape[1] * c.itemsize
    x, given, w = a.ctypes.data, b.ctypes.data, panel.ctypes.data
    y = c.ctypes.data + place * c.itemsize
    if count <= _FEW_UP_TO:
        for first in range(0, row, _LONG):
            length = min(_LONG, row - first)
            for m in range(0, count, FEW):
                left, sums = x + m * row + first, y + m * c_row
                for n in range(0, OUTPUTS, 2):
                    right = given + n * row + first
                    _add_dots(a, left, row, right, row, length, sums + n * 4, c_row)
        return
    for n in range(0, OUTPUTS, 8):
        for k in range(0, row, 32):
            _transpose(given + n * row + k, row, w + k * OUTPUTS + n * 4)
    pieces = -(-row // _PIECE)
    piece = -(-row // (pieces * 4)) * 4
    for first in range(0, row, piece):
        length = min(piece, row - first)
        for m in range(0, count, ROWS):
            _add_tile(
                a, x + m * row + first, row, w + first * OUTPUTS, length, y + m * c_row, c_row, 0,
                0, 0,
            )  # fmt: skip
