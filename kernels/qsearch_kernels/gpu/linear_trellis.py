"""Products with trellis-coded weights: decoded to int8 between the load and the tensor core.

The weight crosses memory at 2, 3 or 4 bits; a state's level is a multiply, an add and a sum of four
bytes, and is what an integer product multiplies (`trellis.py`). Activations are int8 rows, or of 16
bits: whole numbers of 8 bits are exact in fp16 and bf16. Decoding is done again for every tile of
rows; with many rows `decode` writes int8 levels once, for `linear_a8`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import trellis
from .launching import Launch, interpreting, processors, rows_of
from .linear_a8 import epilogue_arguments
from .parts import finish, place
from .tiles import UNPACKING_TILES, Tile, choose
from .trellis_parts import trellis_levels

_ROWS, _COLUMNS = 32, 128
#: levels are computed on the way, for which a larger tile has no registers left
TILES = (Tile(128, 64, 128, 8, 3, 0.75), UNPACKING_TILES[2])


@triton.jit
def _linear_trellis(
    a, words, out, a_scale, a_zero, w_scale, w_total, bias, gate, residual, M, N, K, across,
    per_scale, per_gate, BITS: tl.constexpr, STATES: tl.constexpr, HIGH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ADDEND: tl.constexpr, INTEGER: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), BAND)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    if INTEGER:
        acc = tl.zeros((BM, BN), tl.int32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        at = k0 + tl.arange(0, BK)
        mask = row_mask[:, None] & (at < K)[None, :]
        x = tl.load(a + rows[:, None].to(tl.int64) * K + at[None, :], mask=mask, other=0.0)
        y = trellis_levels(
            words, columns, column_mask, across, k0, BITS, STATES, HIGH, MULTIPLIER, ADDEND, BN, BK
        )
        if INTEGER:
            acc = tl.dot(x, y.T, acc, out_dtype=tl.int32)
        elif EXACT:
            acc = tl.dot(x.to(tl.float32), y.to(tl.float32).T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, y.to(x.dtype).T, acc)
    if INTEGER:
        finish(
            acc, out, rows, column_tile * BN, M, N, a_scale, a_zero, None, w_scale, None, w_total,
            bias, gate, residual, per_scale, per_gate, BM, BN,
        )  # fmt: skip
    else:
        scale = tl.load(w_scale + columns, mask=column_mask, other=0.0)
        result = acc * scale[None, :]
        if bias is not None:
            result += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        where = rows[:, None].to(tl.int64) * N + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(out + where, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _decode(
    words, scale, out, N, K, across, BITS: tl.constexpr, STATES: tl.constexpr, HIGH: tl.constexpr,
    MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    row_mask = rows < N
    level = trellis_levels(
        words, rows, row_mask, across, k0, BITS, STATES, HIGH, MULTIPLIER, ADDEND, BN, BK
    )
    at = k0 + tl.arange(0, BK)
    where = rows[:, None].to(tl.int64) * K + at[None, :]
    mask = row_mask[:, None] & (at < K)[None, :]
    if scale is None:
        tl.store(out + where, level, mask=mask)
    else:
        wide = level.to(tl.float32) * tl.load(scale + rows, mask=row_mask, other=0.0)[:, None]
        tl.store(out + where, wide.to(out.dtype.element_ty), mask=mask)


def linear_trellis_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_total: Tensor | None = None,
    bits: int = 2,
    states: int = 12,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches and the output that they fill: `trellis_products.linear_trellis_a8`.

    Raises `ValueError` for shapes that don't fit.
    """
    rows, columns, N = codes.shape[:-1].numel(), codes.shape[-1], w_scale.numel()
    words = _words(packed, N, columns, bits, states)
    if codes.dtype != torch.int8:
        raise ValueError(f"rounded rows are int8; given {codes.dtype}")
    out = torch.empty(*codes.shape[:-1], N, device=codes.device, dtype=dtype)
    if not out.numel():
        return (), out
    epilogue = epilogue_arguments(
        rows, N, 1, a_scale, a_zero, None, w_scale.float(), None, w_total, bias, gate, residual
    )
    given = {**epilogue, "a": codes.reshape(rows, columns).contiguous(), "INTEGER": True}
    return (_product(words, out, given, rows, N, columns, bits, states, tile),), out


def linear_trellis(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bits: int = 2,
    states: int = 12,
    bias: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches and the output that they fill: `trellis_products.linear_trellis`.

    Raises `ValueError` for shapes that don't fit.
    """
    a, N = rows_of(x).contiguous(), w_scale.numel()
    words = _words(packed, N, x.shape[-1], bits, states)
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    if not out.numel():
        return (), out
    given = {
        "a": a, "a_scale": None, "a_zero": None, "w_scale": w_scale.float().contiguous(),
        "w_total": None, "bias": bias, "gate": None, "residual": None, "per_scale": 1,
        "per_gate": 1, "INTEGER": False,
    }  # fmt: skip
    return (_product(words, out, given, len(a), N, x.shape[-1], bits, states, tile),), out


def decode(
    packed: Tensor,
    scale: Tensor | None,
    bits: int,
    states: int,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.int8,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches and what they fill, [rows, columns]: `trellis.decode`, or in `dtype` and times
    `scale` [rows, 1], `trellis.dequantize`. Raises `ValueError` for shapes that don't fit.
    """
    words = _words(packed, rows, columns, bits, states)
    out = torch.empty(rows, columns, device=packed.device, dtype=dtype)
    if not out.numel():
        return (), out
    arguments = {
        "words": words, "scale": None if scale is None else scale.float().contiguous(), "out": out,
        "N": rows, "K": columns, "across": packed.shape[1], "BITS": bits, "STATES": states,
        "HIGH": trellis.height(rows),
        "MULTIPLIER": trellis.MULTIPLIER, "ADDEND": trellis.ADDEND, "BN": _ROWS, "BK": _COLUMNS,
    }  # fmt: skip
    return (Launch(_decode, (-(-rows // _ROWS), -(-columns // _COLUMNS)), arguments, 4, 1),), out


def _product(
    words: Tensor,
    out: Tensor,
    given: Mapping[str, object],
    rows: int,
    N: int,
    columns: int,
    bits: int,
    states: int,
    tile: Tile | None,
) -> Launch:
    tile = tile or choose(f"linear_trellis {bits}", rows, N, columns, processors(out), TILES)
    integer = bool(given["INTEGER"])
    arguments = {
        **given, "words": words, "out": out, "M": rows, "N": N, "K": columns,
        "across": words.shape[1], "BITS": bits, "STATES": states, "HIGH": trellis.height(N),
        "MULTIPLIER": trellis.MULTIPLIER, "ADDEND": trellis.ADDEND,
        "EXACT": not integer and (out.dtype == torch.float32 or interpreting()),
        "BM": tile.m, "BN": tile.n, "BK": tile.k if integer else min(tile.k, 64), "BAND": 8,
    }  # fmt: skip
    grid = (-(-rows // tile.m) * -(-N // tile.n),)
    return Launch(_linear_trellis, grid, arguments, tile.warps, tile.stages)


def _words(packed: Tensor, rows: int, columns: int, bits: int, states: int) -> Tensor:
    """Packed tiles as int32 words [row tiles, column tiles, height * bits / 8]."""
    trellis.check_packed(packed, bits, states, rows, columns)
    if packed.device.type == "meta":
        shape = (*packed.shape[:2], packed.shape[2] // 4)
        return torch.empty(shape, dtype=torch.int32, device="meta")
    return packed.contiguous().view(torch.int32)
