"""What the weight-only kernels mean, in plain torch: weights `scale * (level - zero - offset)`,
alone and times activations that stay as they are.

Arguments as a stored weight has them: `codes` uint8 [rows, row bytes] in the layout of `layout.py`,
or int8 [rows, columns], integers of 8 bits less 128; `scale`, `zero`: [rows, groups], for a group
of -1 [1, 1], or None = 1 and 0; `offset`: one number for all; `levels`: None = the codes
themselves, [2**bits] or [1, 2**bits] for all rows, [rows, 2**bits], or [rows, groups, 2**bits];
`group`: neighbours of a row that share a scale, 0 = the row, -1 = the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import row_bytes, unpack

MOST_ROWS = 16  # of activations that one tensor-core instruction takes


def dequantize_levels(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    offset: float,
    levels: Tensor | None,
    bits: int,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [rows, columns] in `dtype`, rounded once."""
    rows, groups, wide = (
        codes.shape[0],
        -(-columns // group) if group > 0 else 1,
        group if group > 0 else max(1, columns),
    )
    check_weight(codes, scale, zero, bits, columns, group)
    table, numbers = table_of(levels, rows, groups, bits), unpack(unsigned(codes), bits, columns)
    level = numbers.double()
    if table is not None:
        each = (table if table.ndim == 3 else table[:, None].expand(-1, groups, -1)).expand(
            rows, -1, -1
        )
        level = (
            each.repeat_interleave(wide, 1)[:, :columns]
            .double()
            .gather(2, numbers.long()[:, :, None])[:, :, 0]
        )
    level = level - offset
    level = level if zero is None else level - zero.double().repeat_interleave(wide, 1)[:, :columns]
    return (
        level if scale is None else level * scale.double().repeat_interleave(wide, 1)[:, :columns]
    ).to(dtype)


def linear_levels(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    levels: Tensor | None,
    bits: int,
    columns: int,
    group: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` [..., rows] in the type of `x` [..., columns], rounded once."""
    weight = dequantize_levels(
        codes, scale, zero, offset, levels, bits, columns, group, torch.float64
    )
    return torch.nn.functional.linear(
        x.double(), weight, None if bias is None else bias.double()
    ).to(x.dtype)


def check_weight(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int, columns: int, group: int
) -> None:
    """Raises `ValueError` with the shape that fits, where one of a weight's tensors has another."""
    rows = codes.shape[0]
    if (
        codes.dtype not in (torch.uint8, torch.int8)
        or codes.shape[1:] != (row_bytes(columns, bits),)
        or (codes.dtype == torch.int8 and bits != 8)
    ):
        raise ValueError(
            f"{columns} codes of {bits} bits are packed in uint8 [rows, "
            f"{row_bytes(columns, bits)}]; given {codes.dtype} of shape "
            f"{tuple(codes.shape)}"
        )
    shape = (1 if group == -1 else rows, -(-columns // group) if group > 0 else 1)
    for name, values in (("scale", scale), ("zero", zero)):
        if values is not None and tuple(values.shape) != shape:
            raise ValueError(
                f"codes {rows} x {columns} in groups of {group} need a {name} of shape "
                f"{shape}; given {tuple(values.shape)}"
            )


def unsigned(codes: Tensor) -> Tensor:
    """Packed codes uint8 of what may be int8 [rows, columns], each code less 128."""
    return codes if codes.dtype == torch.uint8 else (codes ^ -128).view(torch.uint8)


def table_of(levels: Tensor | None, rows: int, groups: int, bits: int) -> Tensor | None:
    """Levels as [1 or rows, 2**bits] or [rows, groups, 2**bits], one behind the other in memory.
    Raises `ValueError` with the shapes that fit.
    """
    if levels is None:
        return None
    table = (
        levels[None]
        if levels.ndim == 1
        else levels[:, 0]
        if levels.ndim == 3 and levels.shape[1] == 1
        else levels
    )
    if tuple(table.shape) not in {(1, 2**bits), (rows, 2**bits), (rows, groups, 2**bits)}:
        raise ValueError(
            f"{rows} rows in {groups} groups with codes of {bits} bits need levels "
            f"[{2**bits}], [{rows}, {2**bits}] or [{rows}, {groups}, {2**bits}]; "
            f"given {tuple(levels.shape)}"
        )
    return table.contiguous()


def takes(rows: int, group: int, levels: Tensor | None) -> bool:
    """Whether so many rows of activations are multiplied with such a weight packed, and it need not
    be dequantized first.
    """
    regular = group <= 0 or (group >= 16 and group & (group - 1) == 0)
    return (
        rows <= MOST_ROWS
        and regular
        and (levels is None or levels.ndim < 3 or levels.shape[1] == 1)
    )
