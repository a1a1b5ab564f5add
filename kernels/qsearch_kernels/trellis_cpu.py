"""Products with trellis-coded weights on a CPU: decoded to bytes a piece at a time, in the cache.

A piece of decoded rows is an int8 weight with one scale a row and no zeros (`trellis.py`), so that
the integer products of `cpu.py` and `cpu_rounded.py` multiply it as they do any other. numba
decodes a weight in about a nanosecond; without it plain torch does, eighty times slower.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpu, trellis
from .activation_cache import shared
from .cpu_rounded import product, row_sums
from .cpu_rows import rows_of
from .jit import compiled
from .weight import Weight

_BYTES = 2**20  # of levels, decoded at a time


@functools.cache
def _table(states: int) -> Any:
    """int8 [2**states], as an array: the level of each state."""
    return trellis.level_of(torch.arange(2**states)).numpy()


def decode_into(packed: Tensor, bits: int, states: int, out: Tensor) -> Tensor:
    """Levels of some row tiles of a weight into `out` int8 [rows, columns], which is given back."""
    fast, high = compiled("trellis_numba"), packed.shape[2] * 2 // bits
    if fast is None:
        level = trellis.level_of(trellis.unpack(packed, bits, states))
        return out.copy_(trellis.from_tiles(level, *out.shape))
    trellis.check(bits, states)
    fast.decode(packed.numpy(), bits, _table(states), high, out.numpy())
    return out


def _pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of pieces of whole tiles that stay in the cache."""
    high = trellis.height(rows)
    step = max(1, _BYTES // max(1, columns) // high) * high
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _decoded(
    packed: Tensor, scale: Tensor, bits: int, states: int, part: tuple[int, int], scratch: Tensor
) -> Weight:
    (begin, end), high = part, trellis.height(scale.numel())
    tile = slice(begin // high, -(-end // high))
    levels = decode_into(packed[tile], bits, states, scratch[: end - begin])
    own = scale.reshape(-1, 1)[begin:end]
    return Weight(levels, own, None, 128.0, None, 8, scratch.shape[1], 0)


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, states: int, bias: Tensor | None = None
) -> Tensor:
    """`trellis_products.linear_trellis`: activations as they are, in digits where those pay."""
    rows, columns = scale.numel(), x.shape[-1]
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    pieces = _pieces(rows, columns)
    for part in pieces:
        scratch = torch.empty(part[1] - part[0], columns, dtype=torch.int8)
        weight = _decoded(packed, scale, bits, states, part, scratch)
        own = None if bias is None else bias[part[0] : part[1]]
        out[..., part[0] : part[1]] = cpu.linear(x, weight, own)
    return out


def linear_rounded(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    states: int,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """The same for activations rounded to `activation` bits as `reference.linear_wnaxi` does."""
    rows, columns = scale.numel(), x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), columns)
    rounded = shared(
        x,
        (activation, 0),
        (low, high),
        id(packed),
        lambda: rows_of(flat, activation, low, high, sums=False),
    )
    out = torch.empty(len(flat), rows, dtype=x.dtype)
    for part in _pieces(rows, columns):
        scratch = torch.empty(part[1] - part[0], columns, dtype=torch.int8)
        weight = _decoded(packed, scale, bits, states, part, scratch)
        own = None if bias is None else bias[part[0] : part[1]]
        out[:, part[0] : part[1]] = product(rounded, weight, own, x.dtype, row_sums(weight))
    return out.view(*x.shape[:-1], rows)
