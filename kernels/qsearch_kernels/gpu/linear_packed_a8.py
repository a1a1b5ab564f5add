"""WqA8: weights of 1 to 8 bits or small codebooks, unpacked to int8 between the load and the tensor
cores.

The weight crosses memory in its packed size, and no unpacked copy exists. Unpacking is done again
for every tile of rows, in registers: worth it where few rows share the work; at many rows `gpu_ops`
unpacks once and calls `linear_a8`. Groups of columns with a scale of their own close their integer
sum in fp32; so a tile is as deep as a group, at most 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import row_bytes
from .launching import Launch, processors
from .linear_a8 import epilogue_arguments
from .parts import codes_at, finish, levels_at, place
from .tiles import CORRECTING_TILES, UNPACKING_TILES, Tile, choose


@triton.jit
def _linear_packed_a8(
    a, packed, table, out, a_scale, a_zero, sums, w_scale, w_zero, w_total, bias, gate, residual, M,
    N, K, bytes_a_row, table_stride, groups, per_scale, per_gate,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), BAND)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    whole = tl.zeros((BM, BN), tl.int32)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        at = k0 + tl.arange(0, BK)
        x = tl.load(
            a + rows[:, None].to(tl.int64) * K + at[None, :],
            mask=row_mask[:, None] & (at < K)[None, :],
            other=0,
        )
        codes = codes_at(packed, columns, column_mask, bytes_a_row, k0, K, BITS, BN, BK)
        if table is not None:
            y = levels_at(codes, table, columns, column_mask, table_stride, k0, K, 0, BITS).to(
                tl.int8
            )
        elif packed.dtype.element_ty == tl.int8:
            y = codes
        else:
            y = (codes.to(tl.int16) - (1 << (BITS - 1))).to(tl.int8)
        if GROUP == 0:
            whole = tl.dot(x, y.T, whole, out_dtype=tl.int32)
        else:
            part = tl.dot(x, y.T, out_dtype=tl.int32).to(tl.float32)
            group = k0 // GROUP
            if w_zero is not None:
                sum_a = tl.load(
                    sums + rows * groups + group, mask=row_mask & (k0 % GROUP == 0), other=0
                ).to(tl.float32)
                part -= (
                    sum_a[:, None]
                    * tl.load(w_zero + columns * groups + group, mask=column_mask, other=0.0)[
                        None, :
                    ]
                )
            total += (
                part
                * tl.load(w_scale + columns * groups + group, mask=column_mask, other=0.0)[None, :]
            )
    first = column_tile * BN
    if GROUP == 0:
        finish(
            whole,
            out,
            rows,
            first,
            M,
            N,
            a_scale,
            a_zero,
            sums,
            w_scale,
            w_zero,
            w_total,
            bias,
            gate,
            residual,
            per_scale,
            per_gate,
            BM,
            BN,
        )
    else:
        finish(
            total,
            out,
            rows,
            first,
            M,
            N,
            a_scale,
            a_zero,
            sums,
            None,
            None,
            w_total,
            bias,
            gate,
            residual,
            per_scale,
            per_gate,
            BM,
            BN,
        )


def linear_packed_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    sums: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None = None,
    w_total: Tensor | None = None,
    table: Tensor | None = None,
    bits: int = 4,
    group: int = 0,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches (none where there is nothing to compute) and the output that they fill:
    `reference_a8.linear_packed_a8`.

    Raises `ValueError` for shapes that don't fit, and for groups that the tensor cores can't close:
    32, 64, 128, ... columns, or whole rows.
    """
    rows, columns = codes.shape[:-1].numel(), codes.shape[-1]
    if group and (group < 32 or group & (group - 1)):
        raise ValueError(
            "int8 tensor cores add up 32, 64, 128, ... columns before a scale; given "
            f"groups of {group}: dequantize this weight instead"
        )
    signed = packed.dtype == torch.int8 and bits == 8 and table is None
    if (
        codes.dtype != torch.int8
        or not (packed.dtype == torch.uint8 or signed)
        or packed.shape[1:] != (row_bytes(columns, bits),)
    ):
        raise ValueError(
            f"int8 rows of {columns} need {bits}-bit weights uint8 [N, "
            f"{row_bytes(columns, bits)}]; given {codes.dtype} and {packed.dtype} of "
            f"shape {tuple(packed.shape)}"
        )
    N, groups = packed.shape[0], -(-columns // group) if group else 1
    if table is not None and (
        table.dtype != torch.int8 or table.shape[1:] != (2**bits,) or table.shape[0] not in (1, N)
    ):
        raise ValueError(
            f"a table for {bits} bits is int8 [1 or {N}, {2**bits}]; given {table.dtype} "
            f"of shape {tuple(table.shape)}"
        )
    out = torch.empty(*codes.shape[:-1], N, device=codes.device, dtype=dtype)
    if not out.numel():
        return (), out
    tiles = CORRECTING_TILES if group and w_zero is not None else UNPACKING_TILES
    tile = tile or choose(
        f"linear_packed_a8 {bits} {group}", rows, N, columns, processors(codes), tiles
    )
    arguments = {
        "a": codes.reshape(rows, columns).contiguous(), "packed": packed.contiguous(),
        "table": None if table is None else table.contiguous(), "out": out,
        **epilogue_arguments(
            rows, N, groups, a_scale, a_zero, sums, w_scale, w_zero, w_total, bias, gate, residual
        ),
        "M": rows, "N": N, "K": columns, "bytes_a_row": packed.shape[1],
        "table_stride": 0 if table is None or len(table) == 1 else 2**bits, "groups": groups,
        "BITS": bits, "GROUP": group, "BM": tile.m, "BN": tile.n,
        "BK": min(tile.k, group or tile.k), "BAND": 8,
    }  # fmt: skip
    return (
        Launch(
            _linear_packed_a8,
            (-(-rows // tile.m) * -(-N // tile.n),),
            arguments,
            tile.warps,
            tile.stages,
        ),
    ), out
