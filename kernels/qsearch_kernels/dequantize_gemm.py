"""GEMM on a CPU with any weight: tiles are dequantized to floating point, one at a time, in the
cache.

For groups, tables and integers whose product of bytes is slower here than a dense product. Against
widening the whole weight (`Weight.dequantize`) it saves writing and reading it at four bytes a
weight, and shuffling: codes come out of their bytes in an order of their own (`layout.py`), and the
smaller operand, rows or weight, is brought into the order of the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .weight import Weight

_FEW = 16  # rows up to which reading the weights takes longer than multiplying
#: weights that are widened at a time, for a few rows and for more: smaller pieces would fit a
#: smaller cache, but each is a call, and a GEMM that packs its rows
_WEIGHTS = (2**20, 2**21)
#: of each thread: the last piece's memory, which takes longer to map anew than to fill
_SCRATCH = threading.local()


def takes(weight: Weight) -> bool:
    """Whether `product` is for this weight: a group begins with a byte."""
    return weight.columns > 0 and (
        weight.group <= 0 or weight.group % layout.phases(weight.bits) == 0
    )


def product(rows: Tensor, weight: Weight) -> Tensor:
    """Rows [M, K] in fp32 or bf16 times the weight, which is widened to their type: fp32 [M, N]."""
    count, outputs = layout.phases(weight.bits), len(weight.codes)
    padded = -(-weight.columns // count) * count
    by_phase = len(rows) <= outputs or count == 1
    given = (
        layout.by_phase(rows, weight.bits)
        if by_phase
        else F.pad(rows, (0, padded - weight.columns))
    )
    scaled = (
        weight.group <= 0 and len(rows) > weight.columns
    )  # scaling the weight is less work than scaling what comes out
    out = torch.empty(len(rows), outputs)
    step = max(64, _WEIGHTS[len(rows) > _FEW] // padded)
    shape = (min(step, outputs), padded)
    levels, bytes_ = scratch(*shape, torch.float32), scratch(*shape, torch.uint8)
    for begin in range(0, outputs, step):
        part = weight.part(begin, begin + step)
        size = len(part.codes)
        piece = levels[:size]
        view = (
            piece.unflatten(-1, (count, -1))
            if by_phase
            else piece.unflatten(-1, (-1, count)).transpose(1, 2)
        )
        _widen(part, bytes_[:size], view)
        if scaled:
            piece.mul_(part.scale.float().view(-1, 1))
        if rows.dtype == torch.float32:
            torch.mm(given, piece.t(), out=out[:, begin : begin + size])
        else:
            out[:, begin : begin + size] = given @ piece.to(rows.dtype).t()
    return out if weight.group > 0 or scaled else out.mul_(weight.scale.float().flatten())


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory [rows, columns] with anything in it, which the next call for this type gives again."""
    size = rows * columns
    kept: Tensor | None = getattr(_SCRATCH, str(dtype), None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=dtype)
        setattr(_SCRATCH, str(dtype), kept)
    return kept[:size].view(rows, columns)


def _widen(weight: Weight, bytes_: Tensor, out: Tensor) -> None:
    """Writes levels less zeros, and times scales if these belong to groups, to `out`
    [n, phases, columns a phase]; `bytes_` is scratch of the same size."""
    codes = (
        weight.codes
        if weight.bits == 8
        else layout.unpack_by_phase(weight.codes, weight.bits, weight.columns, bytes_)
    )
    base = 128 if codes.dtype == torch.int8 else 0
    if weight.levels is not None:
        places = codes.int().view(out.shape)
        if weight.levels.ndim == 3:
            tables = torch.arange(
                0, weight.levels.numel(), weight.levels.shape[2], dtype=torch.int32
            ).view(weight.levels.shape[:2])
            for place, table in _by_group(places, tables, weight.group):
                place.add_(table)
        found = torch.index_select(weight.levels.float().flatten(), 0, places.flatten())
        out.copy_(found.view(out.shape))
    elif (
        weight.zero is None
        and weight.offset == weight.offset // 1
        and codes.dtype == torch.uint8
        and weight.bits < 8
    ):
        out.copy_(
            bytes_.sub_(bytes_.new_tensor(int(weight.offset))).view(torch.int8).view(out.shape)
        )  # whole and below 128: as bytes
        base, weight = 0, weight._replace(offset=0.0)
    else:
        out.copy_(codes.view(out.shape))
    if weight.zero is not None:
        for place, zero in _by_group(out, weight.zero.float().sub_(base), weight.group):
            place.sub_(zero)
    elif weight.offset != base:
        out.sub_(weight.offset - base)
    if weight.group > 0:
        for place, scale in _by_group(out, weight.scale.float(), weight.group):
            place.mul_(scale)


def _by_group(values: Tensor, each: Tensor, group: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of values [n, phases, columns a phase] and what `each` [n or 1, groups] has for them:
    the whole groups, then the incomplete last one."""
    if group <= 0:
        yield values, each[:, :, None]
        return
    size = group // values.shape[1]
    count = values.shape[2] // size
    if count:
        yield values[..., : count * size].unflatten(-1, (count, size)), each[:, None, :count, None]
    if values.shape[2] % size:
        yield values[..., count * size :], each[:, None, count:]
