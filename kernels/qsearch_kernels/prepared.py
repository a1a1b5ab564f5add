"""Prepared: what an int8 product must know of a weight besides its codes, worked out once when a
model is loaded.

A stored weight is `scale * (level - zero)` (see `reference.py`). The product takes signed codes,
scales and zeros in fp32, the sum of each row (which undoes the zero of the activations), and levels
that are no codes as whole numbers of 8 bits. Small float formats are whole numbers times a power of
two, so that nothing is
lost: e2m1 is 0, 1, 2, 3, 4, 6, 8, 12 halves. Codebooks are rounded to 8 bits, and only where that
    is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import layout, reference_a8
from .reference_levels import unsigned


class Prepared(NamedTuple):
    """The arguments of `reference_a8.linear_packed_a8` that belong to a weight [N, columns].

    `codes`: uint8 in the layout of `layout.py`, int8 [N, columns], or e4m3; `scale`, `zero`: fp32
    [N, groups]; `total`: fp32 [N]; `table`: int8 [1 or N, 2**bits].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    total: Tensor
    table: Tensor | None
    bits: int
    group: int


def prepare(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    levels: Tensor | None,
    bits: int,
    columns: int,
    group: int,
    round_codebooks: bool = False,
) -> Prepared:
    """A stored weight for int8 products. `codes`: uint8 packed, or int8 [N, columns] for integers
    of 8 bits (a code less 128).

    `scale`, `zero` (None = `offset` for all): [N, groups], [1, 1] for group -1; `levels`: None,
    [2**bits], or codebooks [N, 1, 2**bits] or [1, 1, 2**bits]. Raises `ValueError` for what no int8
    product computes exactly (or nearly, with `round_codebooks`): such a weight has to be
    dequantized.
    """
    rows = codes.shape[0]
    group = 0 if group >= columns else group
    if group > 0 and (group < 32 or group & (group - 1)):
        raise ValueError(
            "int8 tensor cores add up 32, 64, 128, ... columns before a scale; given "
            f"groups of {group}: dequantize this weight instead"
        )
    wide, shift = max(0, group), 0.0 if levels is not None else 2.0 ** (bits - 1)
    groups = -(-columns // wide) if wide else 1
    s = scale.float().expand(rows, groups)
    z = (torch.full_like(s, offset) if zero is None else zero.float().expand(rows, groups)) - shift
    table = None
    if levels is not None:
        table, factor = _table(levels, round_codebooks)
        s = s * factor
        z = z / factor
    numbers = layout.unpack(unsigned(codes), bits, columns)
    level = (
        numbers.double() - shift
        if table is None
        else table.expand(rows, -1).gather(1, numbers.long()).double()
    )
    each, zeros = (v.double().repeat_interleave(wide or columns, 1)[:, :columns] for v in (s, z))
    total = (each * (level - zeros)).sum(1).float()
    return Prepared(
        codes, s.contiguous(), z.contiguous() if bool(z.any()) else None, total, table, bits, wide
    )


def prepare_fp8(codes: Tensor, scale: Tensor, levels: Tensor) -> Prepared:
    """A stored e4m3 weight for fp8 products: `codes` uint8 [N, columns] are the floats themselves,
    their unit goes into `scale` [N, 1] or [1, 1].

    `levels`: [256], what each code stands for. Raises `ValueError` where they are no multiple of
    e4m3's values: such a weight has to be dequantized.
    """
    spelt = (
        torch.arange(256, device=levels.device).to(torch.uint8).view(torch.float8_e4m3fn).float()
    )
    finite = spelt.isfinite()
    unit = levels.float()[126] / spelt[126]
    if (
        codes.dtype != torch.uint8
        or scale.shape[1:] != (1,)
        or not torch.equal(levels.float()[finite], spelt[finite] * unit)
    ):
        raise ValueError(
            f"fp8 products take e4m3 codes with one scale a row; given {codes.dtype} and "
            f"scales {tuple(scale.shape)}: dequantize this weight instead"
        )
    s = (scale.float() * unit).expand(codes.shape[0], 1).contiguous()
    floats = codes.view(torch.float8_e4m3fn)
    return Prepared(floats, s, None, s[:, 0] * floats.float().sum(1), None, 8, 0)


def _table(levels: Tensor, round_codebooks: bool) -> tuple[Tensor, Tensor | float]:
    """(whole numbers int8 [1 or N, 2**bits], what one of them stands for: a number, or fp32 [N,
    1]).
    """
    flat = levels.float().reshape(-1, levels.shape[-1])
    for exponent in range(-8, 17):
        whole = flat * 2.0**exponent
        if bool((whole == whole.round()).all()) and float(whole.abs().max()) <= 127:
            return whole.to(torch.int8), 2.0**-exponent
    if not round_codebooks or (levels.ndim == 3 and levels.shape[1] != 1):
        raise ValueError(
            "levels in an int8 product are whole numbers up to 127 times a power of two, "
            "or one codebook a row, rounded to 8 bits where that is asked for; "
            f"given {tuple(levels.shape)}: dequantize this weight instead"
        )
    table, unit = reference_a8.whole_numbers(flat)
    return table, unit[:, None]
