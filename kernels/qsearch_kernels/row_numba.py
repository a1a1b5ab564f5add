"""One row times a packed weight, as numba compiles it for a CPU: codes become numbers in registers
and are multiplied at once, so that reading the weight is all that takes time.

Each plane of the codes (`layout.py`) has a product of its own, with the row in that plane's order
of phases; the weight's zeros are multiplied with the row's sums.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit, jit_fast

_int, _float = np.int32, np.float32


@jit_fast
def _bytes(x, codes):
    """The product of fp32 with bytes that have a sign."""
    total = _float(0)
    for k in range(len(codes)):
        total += x[k] * _float(_int(codes[k]))
    return total


def _plane(width):
    """An intrinsic: the product of fp32 [phases, bytes] with the codes of `count` bytes, a multiple
    of 8; addresses, and bytes from one phase to the next."""

    @intrinsic
    def dot(typing, x, stride, codes, count):
        def generate(context, builder, signature, arguments):
            x, stride, codes, count = arguments
            real, short, whole = ir.FloatType(), ir.IntType(32), ir.IntType(64)
            sums, eight, bytes_ = (ir.VectorType(t, 8) for t in (real, short, ir.IntType(8)))
            multiply, together = (
                cgutils.get_or_insert_function(builder.module, ir.FunctionType(*form), name)
                for name, form in (
                    ("llvm.fmuladd.v8f32", (sums, [sums] * 3)),
                    ("llvm.vector.reduce.fadd.v8f32", (real, [real, sums])),
                )
            )
            lines = [x]
            for _ in range(8 // width - 1):
                lines.append(builder.add(lines[-1], stride))
            before, zeros = builder.block, ir.Constant(sums, [0.0] * 8)
            loop, dots, done = (builder.append_basic_block(n) for n in ("loop", "dots", "done"))
            builder.branch(loop)
            builder.position_at_end(loop)
            step, held = builder.phi(whole), [builder.phi(sums) for _ in lines]
            builder.cbranch(builder.icmp_signed("<", step, count), dots, done)
            builder.position_at_end(dots)
            place = builder.inttoptr(builder.add(codes, step), bytes_.as_pointer())
            numbers = builder.zext(builder.load(place, align=1), eight)
            following = builder.add(step, ir.Constant(whole, 8))
            step.add_incoming(ir.Constant(whole, 0), before)
            step.add_incoming(following, dots)
            offset = builder.mul(step, ir.Constant(whole, 4))
            for phase, (line, total) in enumerate(zip(lines, held, strict=True)):
                down = ir.Constant(eight, [phase * width] * 8)
                mask = ir.Constant(eight, [(1 << width) - 1] * 8)
                code = builder.sitofp(builder.and_(builder.lshr(numbers, down), mask), sums)
                given = builder.inttoptr(builder.add(line, offset), sums.as_pointer())
                made = builder.call(multiply, [builder.load(given, align=4), code, total])
                total.add_incoming(zeros, before)
                total.add_incoming(made, dots)
            builder.branch(loop)
            builder.position_at_end(done)
            total = held[0]
            for more in held[1:]:
                total = builder.fadd(total, more)
            call = builder.call(together, [ir.Constant(real, -0.0), total])
            call.fastmath.add("reassoc")
            return call

        return types.float32(*[types.intp] * 4), generate

    return dot


_plane_1, _plane_2, _plane_4 = _plane(1), _plane(2), _plane(4)


@jit
def _codes(x, begin, stride, row, first, last, width):
    """The product of fp32 `x` from `begin` on, `stride` from one phase to the next, with the codes
    of the bytes of `row` from `first` to `last`. (Slices would take as long as a group.)"""
    whole, mask = first + (last - first) // 8 * 8, _int((1 << width) - 1)
    line, codes = x.ctypes.data + 4 * begin, row.ctypes.data + first
    if width == 4:
        total = _plane_4(line, 4 * stride, codes, whole - first)
    elif width == 2:
        total = _plane_2(line, 4 * stride, codes, whole - first)
    else:
        total = _plane_1(line, 4 * stride, codes, whole - first)
    for k in range(whole, last):
        for phase in range(8 // width):
            code = _int(_int(_int(row[k]) >> _int(phase * width)) & mask)
            total += x[begin + phase * stride + k - first] * _float(code)
    return total


@jit
def product(x, sums, packed, signed, widths, columns, piece, zero, scale, out):
    """`out` fp64 [n] = a row times each row of the weight `packed` uint8 [n, row bytes].

    `x` fp32 is the row in the order of phases of the first plane, then of the next. `signed`:
    whether the weight is bytes with a sign, codes of 8 bits less 128. Every `piece` columns are
    added up in fp32, the pieces in fp64. `zero`, `scale` fp32 [n, groups], one for each piece
    where there are several; `sums` fp64 [groups] are those of the row.
    """
    groups = scale.shape[1]
    for n in range(len(packed)):
        total, start, before, worth = 0.0, 0, 0, 1.0
        row, numbers, units = packed[n], packed[n].view(np.int8), scale[n]
        for width in widths:
            length = -(-columns * width // 8)
            size = piece * width // 8
            for number in range(-(-length // size)):
                first = number * size
                last = min(first + size, length)
                if signed:
                    part = _bytes(x[before + first :], numbers[first:last])
                else:
                    begin = before + first
                    part = _codes(x, begin, length, row, start + first, start + last, width)
                total += worth * part * (units[number] if groups > 1 else units[0])
            before += 8 // width * length
            start, worth = start + length, worth * (1 << width)
        for group in range(groups):
            total -= sums[group] * zero[n, group] * units[group]
        out[n] = total
