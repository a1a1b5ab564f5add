"""Integer GEMM of few rows (small M, at most 16) on a CPU: weights of fewer than 8 bits, one scale
a row.

With a few rows, reading the weight and bringing it into a form that can be multiplied is all that
takes time, and a row more costs next to nothing. So whatever could be done to the weight is done to
the rows instead, and the weight is only spread to bytes, a piece at a time, while it lies in the
cache:

- the codes of each phase of each plane (`layout.py`) have a product of their own, with every so
    many columns of the rows: they are cut out of their bytes where
  they stand, which is one pass, and makes them a power of two too large;
- a row is cut into digits, and each digit is a row of bytes. A core multiplies bytes from 0 to 255
    with signed ones (two signed ones take up to six times as long
  with AVX512-VNNI). Of several rows the digits are unsigned, 128 more than they are, and one more
  row, of ones, gives the sum of the weights, 128 times which is what that has added. Of one row
  alone the digits are columns, and the codes are what is unsigned: such a product reads the weight
  once and copies nothing.

All sums of bytes are exact in 32 bits and put together in 64. A row that holds something not finite
becomes nothing but such.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .weight import Weight

_BYTES = 2**21  # of weights, spread at a time
MOST = 16  # rows up to which reading the weights is what takes time
LONGEST = 2**16  # columns whose products of 255 and -128 add up in 32 bits


@lru_cache(maxsize=1)
def exact() -> bool:
    """Whether products of unsigned and signed bytes are exact here: a core without VNNI may add
    pairs of them in 16 bits, and an older torch has none.
    """
    unsigned, signed = (
        torch.full((32, 64), 255, dtype=torch.uint8),
        torch.full((32, 64), -128, dtype=torch.int8),
    )
    try:
        return all(
            bool((torch._int_mm(unsigned[:m], signed[:n].t()) == -255 * 128 * 64).all())
            for m, n in ((1, 32), (2, 32), (32, 1))
        )
    except RuntimeError:
        return False


def takes(weight: Weight) -> bool:
    """Whether `product` is for this weight, on this machine."""
    return (
        weight.bits < 8
        and weight.levels is None
        and weight.group <= 0
        and 0 < weight.columns <= LONGEST
        and exact()
    )


def product(rows: Tensor, weight: Weight, count: int) -> Tensor:
    """fp32 rows [M, K], M > 0, in `count` digits, times the weight: fp32 [M, N]."""
    digits, scale, total = _digits(rows, count)
    sums = _sums(digits, weight)
    y = sums[: len(rows)]
    for place in range(1, count):
        y.add_(sums[place * len(rows) : (place + 1) * len(rows)], alpha=256**place)
    if len(rows) > 1:
        y.sub_(sums[-1], alpha=_ones(count, 128))
    zero = (
        y.new_full((1,), weight.offset) if weight.zero is None else weight.zero.double().flatten()
    )
    y.addcmul_(total, zero[None], value=-1)
    return y.float().mul_(weight.scale.float().flatten()).mul_(scale)


def _ones(count: int, digit: int) -> int:
    """The number whose `count` digits are all this one."""
    return digit * sum(1 << 8 * place for place in range(count))


def _digits(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest digit of every row, then the next: int8 [count, K] of one row, else uint8 [count *
    M + 1, K], 128 more, and ones at the end.

    And [M, 1]: the scale that a row is scale * (d0 + 256 * (d1 + 256 * d2)) with, and the sum of
    what it multiplies, in 64 bits.
    """
    scale = (
        rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(_ones(count, 127) - 2)
    )  # 2: what dividing may add to the longest
    left = torch.div(rows, scale).round_()
    total = left.sum(-1, keepdim=True, dtype=torch.float64)
    places = (
        left.to(torch.int32)
        .add_(_ones(count, 128))
        .view(torch.uint8)
        .unflatten(-1, (-1, 4))[..., :count]
        .permute(2, 0, 1)
    )
    if len(rows) == 1:
        return (places[:, 0] ^ 128).view(torch.int8), scale, total
    digits = torch.ones(count * len(rows) + 1, rows.shape[-1], dtype=torch.uint8)
    digits[:-1].unflatten(0, (count, -1)).copy_(places)
    return digits, scale, total


def _sums(digits: Tensor, weight: Weight) -> Tensor:
    """In 64 bits, [R, N]: digits [R, K], of either kind, times the codes."""
    total = torch.zeros(len(digits), len(weight.codes), dtype=torch.float64)
    start = shift = 0
    for width in layout.planes(weight.bits):
        length = layout.row_bytes(weight.columns, width)
        phases = layout.by_phase(digits, width).unflatten(1, (-1, length)).transpose(0, 1)
        phases = (
            F.pad(phases, (0, 1)) if length == 1 else phases.contiguous()
        )  # torch 2.13's _int_mm reads beyond a matrix of one column
        step = max(64, _BYTES // length)
        scratch = torch.empty(min(step, len(weight.codes)), phases.shape[2], dtype=torch.uint8)
        for begin in range(0, len(weight.codes), step):
            codes = weight.codes[begin : begin + step, start : start + length]
            codes = F.pad(codes, (0, 1)) if length == 1 else codes.contiguous()
            _add_phases(
                total[:, begin : begin + step], phases, codes, scratch[: len(codes)], width, shift
            )
        start, shift = start + length, shift + width
    return total


def _add_phases(
    total: Tensor, phases: Tensor, codes: Tensor, scratch: Tensor, width: int, shift: int
) -> None:
    """Adds to `total` [R, n] the products of digits [phases, R, bytes] with a plane [n, bytes],
    whose codes are worth 2**shift.
    """
    for phase, digits in enumerate(phases):
        place = phase * width
        if digits.dtype == torch.uint8 and place + width == 8:  # the last bit would be a sign
            torch.bitwise_right_shift(codes, place, out=scratch)
            place = 0
        else:  # where they stand: they are so many times too large
            torch.bitwise_and(codes, codes.new_tensor((2**width - 1) << place), out=scratch)
        if digits.dtype == torch.uint8:
            total.add_(
                torch._int_mm(digits, scratch.view(torch.int8).t()), alpha=2.0 ** (shift - place)
            )
        else:
            for row, digit in zip(total, digits, strict=True):
                row.add_(torch._int_mm(scratch, digit[:, None])[:, 0], alpha=2.0 ** (shift - place))
