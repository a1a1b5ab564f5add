"""Products of a few rows on a CPU with any weight: widened to fp32 a piece at a time, in the cache, in the order in which codes come out of their bytes.

For groups and for tables that no product of bytes takes. Against widening the whole weight (`Weight.dequantize`) it saves writing and reading it at four bytes
a weight, and bringing codes into their order: the rows are brought into that of the codes instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .weight import Weight

_WEIGHTS = (
    2**20
)  # widened at a time: smaller pieces would fit a smaller cache, but a call on each takes as long as they do


def takes(weight: Weight) -> bool:
    """Whether `product` is for this weight: a group begins with a byte."""
    return weight.columns > 0 and (
        weight.group <= 0 or weight.group % layout.phases(weight.bits) == 0
    )


def product(rows: Tensor, weight: Weight) -> Tensor:
    """fp32 rows [M, K] times the weight: fp32 [M, N]."""
    count = layout.phases(weight.bits)
    ordered = layout.by_phase(rows, weight.bits)
    out = torch.empty(len(rows), len(weight.codes))
    step = max(64, _WEIGHTS // ordered.shape[1])
    levels = torch.empty(min(step, len(weight.codes)), ordered.shape[1])
    bytes_ = torch.empty(levels.shape, dtype=torch.uint8)
    for begin in range(0, len(weight.codes), step):
        part = weight.part(begin, begin + step)
        size = len(part.codes)
        _widen(part, bytes_[:size], levels[:size].unflatten(-1, (count, -1)))
        out[:, begin : begin + size] = F.linear(ordered, levels[:size])
    return out if weight.group > 0 else out.mul_(weight.scale.float().flatten())


def _widen(weight: Weight, bytes_: Tensor, out: Tensor) -> None:
    """Writes levels less zeros, and times scales if these belong to groups, to `out` [n, phases, columns a phase]; `bytes_` is scratch of the same size."""
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
        torch.index_select(weight.levels.float().flatten(), 0, places.flatten(), out=out.view(-1))
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
    """Views of values [n, phases, columns a phase] and what `each` [n or 1, groups] has for them: the whole groups, then the incomplete last one."""
    if group <= 0:
        yield values, each[:, :, None]
        return
    size = group // values.shape[1]
    count = values.shape[2] // size
    if count:
        yield values[..., : count * size].unflatten(-1, (count, size)), each[:, None, :count, None]
    if values.shape[2] % size:
        yield values[..., count * size :], each[:, None, count:]
