"""Products of a few rows on a CPU with integers of fewer than 8 bits and one scale a row.

With a few rows, reading the weight and bringing it into a form that can be multiplied is all that takes time, and a row more costs next to nothing. So whatever could
be done to the weight is done to the rows instead, and the weight is only spread to bytes, a piece at a time, while it lies in the cache:

- each plane of the codes (`layout.py`) is spread by phases and has a product of its own; the rows are brought into its order;
- a row is cut into digits, and each digit is a row of bytes from 0 to 255, since that is what a core multiplies with signed bytes (two signed ones take up to
  six times as long with AVX512-VNNI); one more row, of ones, gives the sum of the weights, 128 times which is what adding 128 to each digit has added.

All sums of bytes are exact in 32 bits and put together in 64. A row that holds something not finite becomes NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import layout
from .weight import Weight

_BYTES = 2**20  # of weights, spread at a time
_LONGEST = 2**16  # columns whose products of 255 and 127 add up in 32 bits


@lru_cache(maxsize=1)
def exact() -> bool:
    """Whether products of unsigned and signed bytes are exact here: a core without VNNI may add pairs of them in 16 bits, and an older torch has none."""
    rows, matrix = torch.full((2, 64), 255, dtype=torch.uint8), torch.full((32, 64), -128, dtype=torch.int8)
    try:
        return all(bool((torch._int_mm(rows[:count], matrix.t()) == -255 * 128 * 64).all()) for count in (1, 2))
    except RuntimeError:
        return False


def takes(weight: Weight) -> bool:
    """Whether `product` is for this weight, on this machine."""
    return weight.bits < 8 and weight.levels is None and weight.group <= 0 and 0 < weight.columns <= _LONGEST and exact()


def product(rows: Tensor, weight: Weight, count: int) -> Tensor:
    """fp32 rows [M, K], M > 0, in `count` digits, times the weight: fp32 [M, N]."""
    digits, scale, total = _digits(rows, count)
    sums = _sums(digits, weight).double()
    units = [256.0**place for place in range(count)]
    y = sums[: len(rows)].mul_(units[0])
    for place in range(1, count):
        y.add_(sums[place * len(rows) : (place + 1) * len(rows)], alpha=units[place])
    y.sub_(sums[-1], alpha=128 * sum(units))
    zero = y.new_full((1,), weight.offset) if weight.zero is None else weight.zero.double().flatten()
    y.addcmul_(total, zero[None], value=-1)
    return y.float().mul_(weight.scale.float().flatten()).mul_(scale)


def _digits(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [count * M + 1, K]: the lowest digit of every row, then the next, and ones; scale and, in 64 bits, the sum of what it multiplies, [M, 1].

    A row is scale * (d0 + 256 * (d1 + 256 * d2)), and d + 128 is stored.
    """
    scale = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(127 * sum(256**i for i in range(count)) - 2)  # 2: what dividing may add to the longest
    left = torch.div(rows, scale).round_()
    total = left.sum(-1, keepdim=True, dtype=torch.float64)
    places = left.to(torch.int32).add_(128 * sum(256**i for i in range(count))).view(torch.uint8).unflatten(-1, (-1, 4))
    digits = torch.ones(count * len(rows) + 1, rows.shape[-1], dtype=torch.uint8)
    digits[:-1].unflatten(0, (count, -1)).copy_(places[..., :count].permute(2, 0, 1))
    return digits, scale, total


def _sums(rows: Tensor, weight: Weight) -> Tensor:
    """int32 [R, N]: rows uint8 [R, K] times the codes."""
    widths = layout.planes(weight.bits)
    ordered = [layout.by_phase(rows, width) for width in widths]
    longest = max(x.shape[1] for x in ordered)
    scratch = torch.empty(max(64, _BYTES // longest), longest, dtype=torch.uint8)
    found = []
    for codes in weight.codes.split(len(scratch)):
        total, start, shift = None, 0, 0
        for width, x in zip(widths, ordered, strict=True):
            end = start + layout.row_bytes(weight.columns, width)
            matrix = layout.unpack_by_phase(codes[:, start:end], width, weight.columns, scratch[: len(codes), : x.shape[1]])
            made = torch._int_mm(x, matrix.view(torch.int8).t())
            total = made if total is None else total.add_(made, alpha=2**shift)
            start, shift = end, shift + width
        assert total is not None
        found.append(total)
    return torch.cat(found, 1) if found else rows.new_zeros(len(rows), 0, dtype=torch.int32)
