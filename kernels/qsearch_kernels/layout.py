"""The bit layout: unsigned codes of 1 to 8 bits, packed into bytes row by row.

A width of 1, 2, 4 or 8 bits divides a byte: code j of a row lies in byte j // (8 / width), the
first code in the lowest bits. Other widths would straddle bytes, and a kernel would need two loads
and a shift for some codes only. So they are cut into planes of such widths, the lowest bits first
(3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1), and a row holds its planes one after another:

    3 bits, row of 10 codes:  | 3 bytes: bits 0 and 1 of every code | 2 bytes: bit 2 of every code |

Each plane is padded with zeros to whole bytes, so that rows start on a byte; what that costs over
bits x columns is under a byte a plane.

Integers of 8 bits lie as signed bytes instead, a code less 128, since that is what integer units
multiply: `pack` makes bytes, `signed` turns them over, `unpack` takes either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .jit import passes

_ARRANGED = (torch.float32, torch.uint8, torch.int8)  # types that numba arranges


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code of `bits` bits, lowest bits first. Raises `ValueError` outside
    1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"a code has 1 to 8 bits; given {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


#: bits -> widths of the planes, as compiled functions take them
WIDTHS = {bits: torch.tensor(planes(bits)).numpy() for bits in range(1, 9)}


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes."""
    return sum(-(-columns * width // 8) for width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., columns], integers in [0, 2**bits), as uint8 [..., row_bytes(columns, bits)].
    Raises `ValueError` for others.
    """
    widths = planes(bits)
    if codes.ndim == 0 or codes.is_floating_point() or codes.is_complex():
        raise ValueError(
            f"codes must be integers with at least one axis; given {codes.dtype} of shape "
            f"{tuple(codes.shape)}"
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(
            f"codes of {bits} bits lie in 0 to {2**bits - 1}; given {int(codes.min())} to "
            f"{int(codes.max())}"
        )
    rows, packed, shift = codes.to(torch.uint8), [], 0
    for width in widths:
        packed.append(_pack_plane((rows >> shift) & _mask(width), width))
        shift += width
    return torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes uint8 [..., columns] from uint8 [..., row_bytes(columns, bits)]. Raises `ValueError`
    where the row's length is another.
    """
    if packed.dtype == torch.int8 and bits == 8:
        packed = unsigned(packed)
    if (
        packed.dtype != torch.uint8
        or packed.ndim == 0
        or packed.shape[-1] != row_bytes(columns, bits)
    ):
        raise ValueError(
            f"{columns} codes of {bits} bits are packed in uint8 [..., "
            f"{row_bytes(columns, bits)}]; given {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    codes = packed.new_zeros(*packed.shape[:-1], columns)
    start = shift = 0
    for width in planes(bits):
        stop = start + row_bytes(columns, width)
        codes |= _unpack_plane(packed[..., start:stop], width, columns) << shift
        start, shift = stop, shift + width
    return codes


def signed(codes: Tensor) -> Tensor:
    """Bytes uint8 of 8-bit codes as int8, each less 128."""
    return (codes ^ 128).view(torch.int8)


def unsigned(codes: Tensor) -> Tensor:
    """The inverse of `signed`."""
    return codes.view(torch.uint8) ^ 128


def phases(bits: int) -> int:
    """How many codes begin at different places of a byte: 8 over the narrowest plane's width."""
    return 8 // planes(bits)[-1]


def unpack_by_phase(packed: Tensor, bits: int, columns: int, out: Tensor) -> Tensor:
    """Codes of a packed weight in an order that costs no shuffling: first those of phase 0, then
    those of phase 1, and so on.

    `packed`: uint8 [rows, row bytes]. `out`: uint8 [rows, padded], padded = `columns` rounded up to
    a multiple of p = `phases(bits)`: place f * padded / p + q holds the code of column q * p + f.
    Whoever sums over columns need only bring the other operand into that order (`by_phase`), which
    is the smaller one. The padding holds code 0, as packed rows do.
    """
    count = phases(bits)
    fast = passes("widen_numba") if packed.device.type == "cpu" else None
    if fast is not None:
        given, widths = packed.contiguous().numpy(), WIDTHS[bits]
        target = out.unflatten(-1, (count, -1)).numpy()
        fast.unpack(given, widths, columns, target)
        return out
    each, start, shift = out.shape[-1] // count, 0, 0
    for width in planes(bits):
        per, length = 8 // width, row_bytes(columns, width)
        stride = phases(bits) // per
        plane = packed[:, start : start + length]
        if length < each * stride:
            plane = torch.nn.functional.pad(plane, (0, each * stride - length))
        plane = plane.unflatten(-1, (each, stride)).movedim(-1, 0)
        if stride > 1:
            plane = plane.contiguous()  # so that every phase reads neighbours
        mask = packed.new_tensor(
            _mask(width)
        )  # a plain number is taken for 64 bits, and costs half as much again
        for phase in range(phases(bits)):
            source, place = plane[phase // per], out[:, phase * each : (phase + 1) * each]
            if shift:
                place |= ((source >> (phase % per * width)) & mask) << shift
            elif phase % per == per - 1:
                torch.bitwise_right_shift(source, phase % per * width, out=place)
            else:
                torch.bitwise_and(
                    source >> (phase % per * width) if phase % per else source, mask, out=place
                )
        start, shift = start + length, shift + width
    return out


def by_phase(x: Tensor, bits: int) -> Tensor:
    """[rows, columns] in the order of `unpack_by_phase`, with zeros where it pads."""
    count = phases(bits)
    if count == 1:
        return x
    fast = passes("widen_numba") if x.device.type == "cpu" and x.dtype in _ARRANGED else None
    if fast is not None:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        made = rows.new_empty(len(rows), count, -(-x.shape[-1] // count))
        given, out = rows.numpy(), made.numpy()
        fast.arrange(given, count, out)
        return made.view(*x.shape[:-1], -1)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % count))
    ordered: Tensor = padded.unflatten(-1, (-1, count)).transpose(-1, -2).flatten(-2)
    return ordered


def _mask(width: int) -> int:
    return (1 << width) - 1


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """uint8 [..., columns] below 2**width -> uint8 [..., bytes]; `width` divides 8."""
    per = 8 // width
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    packed = padded[..., 0::per].clone()
    for place in range(1, per):
        packed |= padded[..., place::per] << (place * width)
    return packed


def _unpack_plane(packed: Tensor, width: int, columns: int) -> Tensor:
    """uint8 [..., bytes] -> uint8 [..., columns] below 2**width; `width` divides 8."""
    per = 8 // width
    codes = torch.stack(
        [(packed >> (place * width)) & _mask(width) for place in range(per)], dim=-1
    )
    return codes.flatten(-2)[..., :columns]
