"""Rows rounded to bytes on a CPU: each row on a grid of its own, or on a given one.

Compiled by numba a row is read once, since its ends are known while it is in the first cache
(`rows_numba.py`); where numba is not installed plain torch does the same in five passes.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import products
from .jit import in_parts, passes
from .reference import grid

_THREAD = 2**16  # numbers that are worth a thread of their own
_NUMBERS = 2**20  # of rows at a time: what is computed between them stays in the last cache


class Bytes(NamedTuple):
    """Rounded rows. `codes`: uint8 [M, K], or int8, 128 less; `scale`, `zero`: fp32 [M, 1]; `sums`:
    fp32 [M, 1], of each row's codes, or None.

    Unsigned bytes are multiplied up to three times as fast as signed ones where rows are few, on
    cores that take them (`products.Table.unsigned`). `largest`: the magnitude that no code exceeds.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor | None
    largest: int = 255


def rows_of(
    rows: Tensor, activation: int, low: Tensor | None, high: Tensor | None, *, sums: bool
) -> Bytes:
    """`rows` [M, K] rounded as `reference.grid` says; `sums`: whether they are wanted."""
    count, columns = rows.shape
    unsigned = products.table().unsigned
    less = 0 if unsigned else 128
    codes = torch.empty(count, columns, dtype=torch.uint8 if unsigned else torch.int8)
    if not codes.numel():
        return Bytes(codes, torch.ones(count, 1), torch.zeros(count, 1), None)
    low, high = (None if end is None else end.reshape(-1, 1) for end in (low, high))
    fast = passes("rows_numba")
    made = _rounded if fast is None else partial(_compiled, fast)
    scale, zero, totals = made(rows, activation, low, high, less, codes)
    largest = 2**activation - 1 if unsigned else 128
    return Bytes(codes, scale, zero, totals.float() if sums else None, largest)


def _compiled(
    fast: ModuleType,
    rows: Tensor,
    activation: int,
    low: Tensor | None,
    high: Tensor | None,
    less: int,
    codes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes codes of `rows`, `less` less than they are; their scales, zeros and sums [M, 1]."""
    short = rows.dtype == torch.bfloat16
    given = (rows if short else rows.float()).contiguous().view(torch.int16).numpy()
    ends = [
        (torch.empty(0) if e is None else e.float().flatten().contiguous()).numpy()
        for e in (low, high)
    ]
    scale, zero = torch.empty(2, len(rows), 1)
    sums, top, out = torch.empty(len(rows), 1, dtype=torch.int32), 2**activation - 1, codes.numpy()
    units, origins, totals = (v.flatten().numpy() for v in (scale, zero, sums))

    def part(begin: int, end: int) -> None:
        some = slice(begin, end)
        own = [e if len(e) < 2 else e[some] for e in ends]
        fast.round_rows(
            given[some], short, *own, top, less, out[some], units[some], origins[some],
            totals[some],
        )  # fmt: skip

    in_parts(part, len(rows), max(1, _THREAD // rows.shape[1]))
    return scale, zero, sums


def _rounded(
    rows: Tensor,
    activation: int,
    low: Tensor | None,
    high: Tensor | None,
    less: int,
    codes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch, some rows at a time."""
    scales, zeros, step = [], [], max(1, _NUMBERS // rows.shape[1])
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step].float()
        own = [e if e is None or len(e) == 1 else e[begin : begin + step] for e in (low, high)]
        # not `aminmax`, which takes ten times as long along an axis
        least, most = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        ends = (least if own[0] is None else own[0], most if own[1] is None else own[1])
        scale, zero = grid(part, activation, *ends)
        place = torch.div(part, scale).add_(zero).round_().clamp_(0, 2**activation - 1).sub_(less)
        codes[begin : begin + step] = place
        # NaN where a row holds something not finite
        scales.append(scale + (least * 0 + most * 0))
        zeros.append(zero.sub_(less).expand(len(part), 1))
    return torch.cat(scales), torch.cat(zeros), codes.sum(-1, keepdim=True, dtype=torch.int32)
