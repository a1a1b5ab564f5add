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
    """An intrinsic: the product of fp32 [phases, bytes] with the codes of `count` bytes, each
    `size` of which are multiplied with the next scale; both are multiples of 8. The others are
    addresses, `stride` bytes from one phase to the next."""

    @intrinsic
    def dot(typing, x, stride, codes, count, scales, size):
        def generate(context, builder, signature, arguments):
            x, stride, codes, count, scales, size = arguments
            real, short, whole = ir.FloatType(), ir.IntType(32), ir.IntType(64)
            sums, eight, bytes_ = (ir.VectorType(t, 8) for t in (real, short, ir.IntType(8)))
            multiply, together = (
                cgutils.get_or_insert_function(builder.module, ir.FunctionType(*form), name)
                for name, form in (
                    ("llvm.fmuladd.v8f32", (sums, [sums] * 3)),
                    ("llvm.vector.reduce.fadd.v8f32", (real, [real, sums])),
                )
            )
            zero, zeros = ir.Constant(whole, 0), ir.Constant(sums, [0.0] * 8)

            def at(place, form):
                return builder.inttoptr(place, form.as_pointer())

            def everywhere(number):
                empty = ir.Constant(sums, ir.Undefined)
                first = builder.insert_element(empty, number, ir.Constant(short, 0))
                return builder.shuffle_vector(first, empty, ir.Constant(eight, [0] * 8))

            lines = [x]
            for _ in range(8 // width - 1):
                lines.append(builder.add(lines[-1], stride))
            before = builder.block
            groups, group, dots, scaled, done = (
                builder.append_basic_block(name)
                for name in ("groups", "group", "dots", "scaled", "done")
            )
            builder.branch(groups)
            builder.position_at_end(groups)
            begin, place, total = builder.phi(whole), builder.phi(whole), builder.phi(sums)
            builder.cbranch(builder.icmp_signed("<", begin, count), group, done)
            builder.position_at_end(group)
            end = builder.add(begin, size)
            end = builder.select(builder.icmp_signed("<", end, count), end, count)
            builder.branch(dots)
            builder.position_at_end(dots)
            step, held = builder.phi(whole), [builder.phi(sums) for _ in lines]
            numbers = builder.load(at(builder.add(codes, step), bytes_), align=1)
            numbers = builder.zext(numbers, eight)
            following = builder.add(step, ir.Constant(whole, 8))
            step.add_incoming(begin, group)
            step.add_incoming(following, dots)
            offset, found = builder.mul(step, ir.Constant(whole, 4)), []
            for phase, (line, own) in enumerate(zip(lines, held, strict=True)):
                down = ir.Constant(eight, [phase * width] * 8)
                mask = ir.Constant(eight, [(1 << width) - 1] * 8)
                code = builder.sitofp(builder.and_(builder.lshr(numbers, down), mask), sums)
                given = builder.load(at(builder.add(line, offset), sums), align=4)
                found.append(builder.call(multiply, [given, code, own]))
                own.add_incoming(zeros, group)
                own.add_incoming(found[-1], dots)
            builder.cbranch(builder.icmp_signed("<", following, end), dots, scaled)
            builder.position_at_end(scaled)
            part = found[0]
            for more in found[1:]:
                part = builder.fadd(part, more)
            scale = everywhere(builder.load(at(builder.add(scales, place), real), align=4))
            later = builder.call(multiply, [part, scale, total])
            for phi, first, new in (
                (begin, zero, end),
                (place, zero, builder.add(place, ir.Constant(whole, 4))),
                (total, zeros, later),
            ):
                phi.add_incoming(first, before)
                phi.add_incoming(new, scaled)
            builder.branch(groups)
            builder.position_at_end(done)
            call = builder.call(together, [ir.Constant(real, -0.0), total])
            call.fastmath.add("reassoc")
            return call

        return types.float32(*[types.intp] * 6), generate

    return dot


_plane_1, _plane_2, _plane_4 = _plane(1), _plane(2), _plane(4)


@jit
def _codes(x, begin, stride, row, first, last, width, scales, size):
    """The product of fp32 `x` from `begin` on, `stride` from one phase to the next, with the codes
    of the bytes of `row` from `first` to `last`, `size` of them for each of `scales`."""
    count = (last - first) // 8 * 8 if size % 8 == 0 else 0
    line, codes, units = x.ctypes.data + 4 * begin, row.ctypes.data + first, scales.ctypes.data
    if width == 4:
        total = _plane_4(line, 4 * stride, codes, count, units, size)
    elif width == 2:
        total = _plane_2(line, 4 * stride, codes, count, units, size)
    else:
        total = _plane_1(line, 4 * stride, codes, count, units, size)
    mask = _int((1 << width) - 1)
    for k in range(count, last - first):
        byte, unit = _int(row[first + k]), scales[k // size]
        for phase in range(8 // width):
            code = _int(_int(byte >> _int(phase * width)) & mask)
            total += x[begin + phase * stride + k] * _float(code) * unit
    return total


@jit_fast
def _zeros(sums, zero, units):
    """What the zeros of the groups take off."""
    total = 0.0
    for group in range(len(sums)):
        total += sums[group] * zero[group] * units[group]
    return total


@jit
def product(x, sums, packed, signed, widths, columns, piece, group, zero, scale, out):
    """`out` fp64 [n] = a row times each row of the weight `packed` uint8 [n, row bytes].

    `x` fp32 is the row in the order of phases of the first plane, then of the next. `signed`:
    whether the weight is bytes with a sign, codes of 8 bits less 128, whose pieces are groups where
    there are any. Every `piece` columns are added up in fp32, the pieces in fp64. `zero`, `scale`
    fp32 [1 or n, groups], one for each `group` columns; `sums` fp64 [groups] are those of the row.
    """
    for n in range(len(packed)):
        total, start, before, worth = 0.0, 0, 0, 1.0
        row, numbers = packed[n], packed[n].view(np.int8)
        units, origins = scale[min(n, len(scale) - 1)], zero[min(n, len(zero) - 1)]
        for width in widths:
            length, size = -(-columns * width // 8), piece * width // 8
            for first in range(0, length, size):
                last = min(first + size, length)
                if signed:
                    part = _bytes(x[first:last], numbers[first:last]) * units[first // group]
                else:
                    part = _codes(
                        x, before + first, length, row, start + first, start + last, width, units,
                        group * width // 8,
                    )  # fmt: skip
                total += worth * part
            before += 8 // width * length
            start, worth = start + length, worth * (1 << width)
        out[n] = total - _zeros(sums, origins, units)
