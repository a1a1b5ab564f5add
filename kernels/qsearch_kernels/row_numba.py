"""One row times a packed weight, as numba compiles it for a CPU: codes become numbers in registers
and are multiplied at once, so that reading the weight is all that takes time.

Each plane of the codes (`layout.py`) has a product of its own, with the row in that plane's order
of phases; the weight's zeros are multiplied with the row's sums. Rounded rows, and fp32 as two
digits of 12 bits, are multiplied in 16 bits (`integer_product`), with half as many instructions.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit, jit_fast
from .rows_numba import ends_of

_int, _short, _float = np.int32, np.int16, np.float32
_SUMS = 4  # sums of a row that do not wait for each other
_MOST = 2**23 - 2**12 - 1  # numbers that 12 bits and 12 more hold, with a sign


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


def _integers(width, rows):
    """An intrinsic: the products of int16 [rows, phases, bytes] with the codes of `count` bytes, a
    multiple of 16, to `out` int32 [rows]; bytes of 8 bits have a sign.

    `x`, `codes`, `out` are addresses, `stride` bytes from one phase to the next, `row` from one row
    to the next. `vpmaddwd` on x86 cores with AVX2, which saturates nowhere.
    """

    @intrinsic
    def dot(typing, x, row, stride, codes, count, out):
        def generate(context, builder, signature, arguments):
            x, row, stride, codes, count, out = arguments
            one, whole = ir.IntType(32), ir.IntType(64)
            forms = ((32, 8), (16, 16), (8, 16))
            sums, pairs, bytes_ = (ir.VectorType(ir.IntType(size), many) for size, many in forms)
            multiply, together = (
                cgutils.get_or_insert_function(builder.module, ir.FunctionType(*form), name)
                for name, form in (
                    ("llvm.x86.avx2.pmadd.wd", (sums, [pairs, pairs])),
                    ("llvm.vector.reduce.add.v8i32", (one, [sums])),
                )
            )
            held = [[cgutils.alloca_once(builder, sums) for _ in range(_SUMS)] for _ in range(rows)]
            for total in (each for own in held for each in own):
                builder.store(ir.Constant(sums, [0] * 8), total)
            with cgutils.for_range_slice(builder, whole(0), count, whole(16), whole) as (step, _):
                place = builder.inttoptr(builder.add(codes, step), bytes_.as_pointer())
                numbers, line = (
                    builder.load(place, align=1),
                    builder.add(x, builder.add(step, step)),
                )
                for phase in range(8 // width):
                    code = builder.lshr(numbers, ir.Constant(bytes_, [phase * width] * 16))
                    code = builder.and_(code, ir.Constant(bytes_, [(1 << width) - 1] * 16))
                    code = (builder.sext if width == 8 else builder.zext)(code, pairs)
                    place = line
                    for own in held:
                        total = own[phase % _SUMS]
                        given = builder.load(builder.inttoptr(place, pairs.as_pointer()), align=2)
                        made = builder.call(multiply, [given, code])
                        builder.store(builder.add(builder.load(total), made), total)
                        place = builder.add(place, row)
                    line = builder.add(line, stride)
            for first, *others in held:
                total = builder.load(first)
                for other in others:
                    total = builder.add(total, builder.load(other))
                found = builder.call(together, [total])
                builder.store(found, builder.inttoptr(out, one.as_pointer()), align=4)
                out = builder.add(out, whole(4))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return dot


_plane_1, _plane_2, _plane_4 = _plane(1), _plane(2), _plane(4)
_one_1, _one_2, _one_4, _one_8 = (_integers(width, 1) for width in (1, 2, 4, 8))
_two_1, _two_2, _two_4, _two_8 = (_integers(width, 2) for width in (1, 2, 4, 8))


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


@jit
def _sums(two, width, x, row, stride, codes, count, out):
    if two:
        if width == 8:
            _two_8(x, row, stride, codes, count, out)
        elif width == 4:
            _two_4(x, row, stride, codes, count, out)
        elif width == 2:
            _two_2(x, row, stride, codes, count, out)
        else:
            _two_1(x, row, stride, codes, count, out)
    elif width == 8:
        _one_8(x, row, stride, codes, count, out)
    elif width == 4:
        _one_4(x, row, stride, codes, count, out)
    elif width == 2:
        _one_2(x, row, stride, codes, count, out)
    else:
        _one_1(x, row, stride, codes, count, out)


@jit
def integer_product(x, unit, packed, widths, columns, out):
    """`out` fp64 [n] = the sums of a row's products with the codes of each row of `packed` uint8
    [n, row bytes] (bytes with a sign, or codes of fewer bits): exact ones times `unit`.

    `x` int16 is the row in the order of phases of the first plane, then of the next; or two rows,
    whose numbers are 4096 times the first's and the second's.
    """
    base, row, given, sums = packed.ctypes.data, packed.shape[1], x.ctypes.data, np.zeros(2, _int)
    for n in range(len(packed)):
        total, start, before, shift = 0, 0, 0, 0
        for width in widths:
            length = -(-columns * width // 8)
            count, codes = length // 16 * 16, base + n * row + start
            _sums(
                len(x) == 2, width, given + 2 * before, 2 * x.shape[1], 2 * length, codes, count,
                sums.ctypes.data,
            )  # fmt: skip
            for k in range(count, length):
                byte = _int(packed[n, start + k])
                for phase in range(8 // width):
                    code = _int(byte >> _int(phase * width)) & _int((1 << width) - 1)
                    code = _int(code - 256) if width == 8 and code > 127 else code
                    for m in range(len(x)):
                        sums[m] += _int(_int(x[m, before + phase * length + k]) * code)
            part = sums[0] if len(x) == 1 else sums[0] * 4096 + sums[1]
            total += part << shift
            before += 8 // width * length
            start, shift = start + length, shift + width
        out[n] = total * unit


@jit
def split(x, out):
    """fp32 numbers as a unit times 4096 times `out[0]` plus `out[1]`, int16 of 12 bits each; NaN is
    the unit of numbers that are not finite."""
    ends = np.empty(2, _float)
    ends_of(x, ends)
    finite = ends[0] > -np.inf and ends[1] < np.inf
    unit = _float(max(-ends[0], ends[1], _float(1e-30)) / _float(_MOST))
    for k in range(len(x)):
        whole = _int(np.rint(x[k] / unit))
        high = _int(_int(whole + _int(2048)) >> _int(12))
        out[0, k], out[1, k] = _short(high), _short(_int(whole - _int(high << _int(12))))
    return unit if finite else _float(np.nan)
