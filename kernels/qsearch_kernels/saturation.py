"""8-bit weights where pairs of products are added in 16 bits: a part that fits, a sparse rest.

`vpmaddubsw` saturates where two neighbouring weights of one sign exceed 128 together: with 255 as
the largest activation, 255 * 129 is more than 16 bits hold. Of the 8-bit weights of a layer, one
or two pairs in a hundred do. Their excess is moved out of the matrix into a list, and a product
with the list is added: the sum is exact, where torch's own int8 layers saturate in silence. FBGEMM
splits outliers off in the same way for its 16-bit sums (Khudia et al. 2021, "FBGEMM: Enabling
High-Performance Low-Precision Deep Learning Inference", section 3).

The list is worked out once a weight, and kept for as long as its codes stay the same: five bytes
an entry, about 4 % of a weight of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_PAIR = 128  # what two weights of one sign may add up to, beside activations up to 255
_DENSEST = 0.06  # entries of the rest a weight; from here on a product in fp32 is faster
_EXACT = 2**24 // 255  # what the magnitudes of a row of the rest may add up to, in fp32
_ROWS = 64  # of activations at a time: what is transposed stays in the cache
_WEIGHTS = 2**20  # split at a time
_SPLITS = WeakTensorKeyDictionary()  # codes -> {order of the columns: (version, rest or None)}


class Rest(NamedTuple):
    """What exceeds, row by row: `place` int32 [entries] (row * columns + column), `excess` int8
    [entries], and `starts` int32 [rows + 1], the first entry of each row."""

    place: Tensor
    excess: Tensor
    starts: Tensor

    def part(self, begin: int, end: int, columns: int) -> Rest:
        """The rest of the rows from `begin` to `end`."""
        end = min(end, len(self.starts) - 1)
        first, last = int(self.starts[begin]), int(self.starts[end])
        starts = self.starts[begin : end + 1] - first
        return Rest(self.place[first:last] - begin * columns, self.excess[first:last], starts)


def split(matrix: Tensor) -> Rest | None:
    """The rest of `matrix` int8 [N, K]; None where it is too much of it, or too large."""
    rows, columns = matrix.shape
    places, excesses, counts = [], [], []
    step = max(1, _WEIGHTS // max(1, columns))
    for begin in range(0, rows, step):
        part = matrix[begin : begin + step]
        pairs = F.pad(part, (0, columns % 2)).short().unflatten(-1, (-1, 2))
        both = pairs.sum(-1, dtype=torch.int16)
        alike = (pairs[..., 0] ^ pairs[..., 1]) >= 0
        over = (both.abs() - _PAIR).clamp_(min=0).mul_(both.sign()).mul_(alike)
        second = pairs[..., 1].abs() > pairs[..., 0].abs()
        excess = torch.stack([over * ~second, over * second], -1).flatten(1)[:, :columns]
        found = excess.nonzero()
        if len(found) > _DENSEST * part.numel():
            return None
        values = excess[found[:, 0], found[:, 1]]
        total = torch.zeros(len(part), dtype=torch.int64)
        if int(total.index_add_(0, found[:, 0], values.abs().long()).max()) > _EXACT:
            return None
        places.append(((found[:, 0] + begin) * columns + found[:, 1]).int())
        excesses.append(values.to(torch.int8))
        counts.append(torch.bincount(found[:, 0], minlength=len(part)))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0).int()
    return Rest(torch.cat(places), torch.cat(excesses), starts)


def rest_of(codes: Tensor, order: int, matrix: Callable[[], Tensor]) -> Rest | None:
    """`split(matrix())`, worked out once for the stored `codes` that the matrix is made of.

    Args:
        codes: the stored codes, which stay where they are from call to call.
        order: what tells one order of the columns from another, for the same codes.
        matrix: makes int8 [N, K], the codes as they are multiplied.
    """
    version = 0 if codes.is_inference() else codes._version
    known = _SPLITS.get(codes)
    if known is None:
        known = _SPLITS[codes] = {}
    if order not in known or known[order][0] != version:
        known[order] = (version, split(matrix()))
    found: Rest | None = known[order][1]
    return found


def without(matrix: Tensor, rest: Rest, out: Tensor | None = None) -> Tensor:
    """A copy of `matrix` int8 [N, K] less its rest: every pair fits. `out`: where to put it."""
    left = (torch.empty(matrix.shape, dtype=torch.int8) if out is None else out).copy_(matrix)
    flat, place = left.view(-1), rest.place.long()
    flat[place] = flat[place] - rest.excess
    return left


def add_rest(sums: Tensor, codes: Tensor, rest: Rest) -> Tensor:
    """Adds to `sums` fp32 [M, N], in place, the product of `codes` uint8 [M, K] with the rest."""
    if not len(rest.place):
        return sums
    column, excess = rest.place % codes.shape[1], rest.excess.float()
    starts = rest.starts[:-1]
    for begin in range(0, len(codes), _ROWS):
        some = codes[begin : begin + _ROWS]
        table = torch.empty(codes.shape[1], len(some)).copy_(some.t())
        made = F.embedding_bag(column, table, starts, mode="sum", per_sample_weights=excess)
        sums[begin : begin + _ROWS].add_(made.t())
    return sums
