"""An exact integer GEMM for x86 cores without VNNI: `vpmaddwd`, as numba compiles it.

`vpmaddwd` multiplies 16 pairs of 16-bit integers and adds neighbours in 32 bits, where nothing
saturates: products of bytes, widened to 16 bits, are exact. With one addition for each that is
twice as many multiplications a cycle as fp32 has, and as many as the `vpmaddubsw` of oneDNN and
FBGEMM reaches, which saturates. A tile of rows and outputs stays in registers; a block of the
weight stays in the second cache, widened once for all rows.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit

ROWS, OUTPUTS = 4, 2  # of a tile: eight sums of eight lanes, in sixteen registers
LANES = 16  # columns a step
_COLUMNS = 2048  # at a time: four rows of them fit the first cache
_BLOCK = 2**17  # weights at a time, of 16 bits each


def _tile(rows: int, outputs: int) -> object:
    """An intrinsic that adds `rows` x `outputs` dot products of 16-bit integers to int32."""

    @intrinsic
    def dots(typing, a, a_row, b, b_row, steps, out, out_row):
        signature = types.void(*[types.intp] * 7)

        def generate(context, builder, signature, arguments):
            a, a_row, b, b_row, steps, out, out_row = arguments
            whole, sums = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES // 2)
            shorts = ir.VectorType(ir.IntType(16), LANES)
            add_pairs = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(sums, [shorts, shorts]), "llvm.x86.avx2.pmadd.wd"
            )
            add_lanes = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.IntType(32), [sums]),
                f"llvm.vector.reduce.add.v{LANES // 2}i32",
            )

            def number(value: int) -> ir.Constant:
                return ir.Constant(whole, value)

            def line(base: ir.Value, stride: ir.Value, index: int, size: int) -> ir.Value:
                return builder.add(base, builder.mul(stride, number(index * size)))

            def load(base: ir.Value, offset: ir.Value) -> ir.Value:
                place = builder.inttoptr(builder.add(base, offset), shorts.as_pointer())
                return builder.load(place, align=2)

            left = [line(a, a_row, i, 2) for i in range(rows)]
            right = [line(b, b_row, j, 2) for j in range(outputs)]
            before = builder.block
            loop, done = (builder.append_basic_block(name) for name in ("dots", "done"))
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(whole)
            held = [[builder.phi(sums) for _ in right] for _ in left]
            offset = builder.mul(step, number(2 * LANES))
            weights = [load(base, offset) for base in right]
            made = []
            for base, own in zip(left, held, strict=True):
                x = load(base, offset)
                made.append(
                    [
                        builder.add(total, builder.call(add_pairs, [x, w]))
                        for total, w in zip(own, weights, strict=True)
                    ]
                )
            following = builder.add(step, number(1))
            step.add_incoming(number(0), before)
            step.add_incoming(following, loop)
            for i in range(rows):
                for j in range(outputs):
                    held[i][j].add_incoming(ir.Constant(sums, [0] * (LANES // 2)), before)
                    held[i][j].add_incoming(made[i][j], loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
            builder.position_at_end(done)
            for i in range(rows):
                for j in range(outputs):
                    place = builder.add(line(out, out_row, i, 4), number(4 * j))
                    target = builder.inttoptr(place, ir.IntType(32).as_pointer())
                    total = builder.call(add_lanes, [made[i][j]])
                    builder.store(builder.add(builder.load(target), total), target)
            return context.get_dummy_value()

        return signature, generate

    return dots


_full, _short = _tile(ROWS, OUTPUTS), _tile(ROWS, 1)
_one_row, _one = _tile(1, OUTPUTS), _tile(1, 1)


@jit
def product(codes, weight, out, place):
    """`codes` int16 [M, K] times `weight` int8 [n, columns] -> `out` int32 [M, N] from `place` on.

    K is `columns` up to a multiple of `LANES`, the rest of the codes zeros.
    """
    count, columns = codes.shape
    outputs, row = len(weight), out.shape[1]
    out[:, place : place + outputs] = 0
    wide = min(columns, _COLUMNS)
    high = max(OUTPUTS, _BLOCK // max(1, wide) // OUTPUTS * OUTPUTS)
    block = np.empty((min(high, outputs), wide), np.int16)
    a, b, c = codes.ctypes.data, block.ctypes.data, out.ctypes.data
    for first in range(0, columns, wide):
        size = min(wide, columns - first)
        steps = size // LANES
        for begin in range(0, outputs, high):
            tall = min(high, outputs - begin)
            for n in range(tall):
                given, line = weight[begin + n, first : first + size], block[n]
                for k in range(len(given)):
                    line[k] = given[k]
                line[len(given) : size] = 0
            m = 0
            while m < count:
                rows = ROWS if m + ROWS <= count else 1
                x = a + 2 * (m * columns + first)
                n = 0
                while n < tall:
                    few = OUTPUTS if n + OUTPUTS <= tall else 1
                    w, y = b + 2 * n * wide, c + 4 * (m * row + place + begin + n)
                    if rows == ROWS:
                        if few == OUTPUTS:
                            _full(x, columns, w, wide, steps, y, row)
                        else:
                            _short(x, columns, w, wide, steps, y, row)
                    elif few == OUTPUTS:
                        _one_row(x, columns, w, wide, steps, y, row)
                    else:
                        _one(x, columns, w, wide, steps, y, row)
                    n += few
                m += rows
