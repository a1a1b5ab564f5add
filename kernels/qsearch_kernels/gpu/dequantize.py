"""Packed weights as a matrix: fp16, bf16 or fp32 for a dense product, or int8 levels for
`linear_a8`.

With many rows of activations a weight is unpacked once into scratch memory, and the product that
follows runs at full speed: 2.5 bytes a weight for 4 bits, about 230 / M of a bf16 product's time.
Unpacking inside the product would be done again for every tile of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_levels import check_weight, table_of
from .launching import Launch
from .parts import codes_at, levels_at, spread

_ROWS, _COLUMNS = 32, 128


@triton.jit
def _dequantize(
    packed, scale, zero, table, out, offset, N, K, bytes_a_row, groups, table_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, TABLE_GROUP: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    row_mask = rows < N
    codes = codes_at(packed, rows, row_mask, bytes_a_row, k0, K, BITS, BN, BK)
    if table is not None:
        level = levels_at(codes, table, rows, row_mask, table_stride, k0, K, TABLE_GROUP, BITS)
    else:
        level = codes.to(tl.float32)
    if zero is not None:
        level -= spread(zero, rows, row_mask, groups, k0, K, GROUP, BK)
    level -= offset
    if scale is not None:
        level *= spread(scale, rows, row_mask, groups, k0, K, GROUP, BK)
    at = k0 + tl.arange(0, BK)
    tl.store(
        out + rows[:, None].to(tl.int64) * K + at[None, :],
        level.to(out.dtype.element_ty),
        mask=row_mask[:, None] & (at < K)[None, :],
    )


def dequantize(
    packed: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    offset: float,
    levels: Tensor | None,
    bits: int,
    columns: int,
    group: int,
    dtype: torch.dtype,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches (none where there is nothing to do) and the weight [rows, columns] in `dtype`
    that they fill: `reference_levels.dequantize_levels`.

    Raises `ValueError` for shapes that don't fit.
    """
    rows, groups = packed.shape[0], -(-columns // group) if group > 0 else 1
    check_weight(packed, scale, zero, bits, columns, group)
    table = table_of(levels, rows, groups, bits)
    out = torch.empty(rows, columns, device=packed.device, dtype=dtype)
    if not out.numel():
        return (), out
    arguments = {
        "packed": packed.contiguous(), "scale": None if scale is None else scale.contiguous(),
        "zero": None if zero is None else zero.contiguous(),
        "table": None if table is None else table.contiguous(), "out": out,
        "offset": offset - 128.0 if packed.dtype == torch.int8 else offset, "N": rows,
        "K": columns,
        "bytes_a_row": packed.shape[1], "groups": groups,
        "table_stride": 0 if table is None or table.shape[0] == 1 else table[0].numel(),
        "BITS": bits, "GROUP": group,
        "TABLE_GROUP": group if table is not None and table.ndim == 3 else 0, "BN": _ROWS,
        "BK": _COLUMNS,
    }  # fmt: skip
    return (
        Launch(
            _dequantize, (-(-rows // _ROWS), -(-columns // _COLUMNS)), arguments, warps=4, stages=1
        ),
    ), out
