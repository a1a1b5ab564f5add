"""Rows rounded to bytes on a CPU: each row on a grid of its own, or on a given one.

Compiled by numba a row is read twice, once for its ends and once for its codes (`rows_numba.py`);
where numba is not installed plain torch does the same in five passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import products
from .jit import passes
from .reference import grid

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
    scales, zeros, totals = [], [], []
    low, high = (None if end is None else end.reshape(-1, 1) for end in (low, high))
    step = max(1, _NUMBERS // columns)
    for begin in range(0, count, step):
        part = rows[begin : begin + step].float().contiguous()
        given = [
            end if end is None or len(end) == 1 else end[begin : begin + step]
            for end in (low, high)
        ]
        least, most = _ends(part)
        scale, zero = grid(
            part,
            activation,
            least if given[0] is None else given[0],
            most if given[1] is None else given[1],
        )
        own = torch.empty(len(part), 1, dtype=torch.int32)
        _round(part, scale, zero, activation, less, codes[begin : begin + step], own)
        poison = least * 0 + most * 0  # NaN where a row holds something not finite
        scales.append(scale + poison)
        zeros.append(zero.sub_(less).expand(len(part), 1))
        if sums:
            totals.append(own.float())
    return Bytes(
        codes,
        torch.cat(scales),
        torch.cat(zeros),
        torch.cat(totals) if sums else None,
        2**activation - 1 if unsigned else 128,
    )


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each row, fp32 [M, 1] each; NaN or infinite for a row that holds
    something not finite."""
    fast = passes("rows_numba")
    if fast is None:  # not `aminmax`, which takes ten times as long along an axis
        return rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    bits, found = rows.view(torch.int32).numpy(), torch.empty(2, len(rows), dtype=torch.int32)
    low, high = found.numpy()
    fast.ends(bits, low, high)
    least, most = found.view(torch.float32)
    return least[:, None], most[:, None]


def _round(
    rows: Tensor,
    scale: Tensor,
    zero: Tensor,
    activation: int,
    less: int,
    codes: Tensor,
    sums: Tensor,
) -> None:
    """Writes the codes of `rows` fp32 [M, K], `less` less than they are, and their sums [M, 1]."""
    fast, top = passes("rows_numba"), 2**activation - 1
    if fast is None:
        place = torch.div(rows, scale).add_(zero).round_().clamp_(0, top).sub_(less)
        codes.copy_(place)
        sums.copy_(codes.sum(-1, keepdim=True, dtype=torch.int32))
        return
    x, out, total = rows.numpy(), codes.numpy(), sums.flatten().numpy()
    units, origins = (each.expand(len(rows), 1).flatten().numpy() for each in (scale, zero))
    fast.round_rows(x, units, origins, top, less, out, total)
