"""Encoding with a trellis: the path of least squared error through each tile, by Viterbi's
algorithm.

Everything is done in whole numbers, so that numba, the slow twin in plain torch and the Triton
kernel give the same codes: tiles are rounded to eighths of a level (a hundredth of a decibel at 4
bits), a path's cost is its squared error in those units, shifted up by `bits`, and the lowest bits
say by which of the 2**bits predecessors the cheapest path came. So one minimum finds cost and path.

A tail-biting path begins in the state it ends in. The best one is nearly found by two passes (QTIP,
arXiv 2406.11235, section 3.2, algorithm 4): the first runs over the seam alone, `SEAM` weights to
each side of it, with free ends; the state it passes there is where the second begins and ends.

The walk is from the last weight to the first: of state s at weight t + 1 come (s << bits | symbol)
mod 2**states at t, as `trellis.py` lays the bits out.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import trellis
from .jit import compiled, in_parts

FINE = 8  # steps of a level to which tiles are rounded
SEAM = 40
#: what a tile is clipped to: far beyond any level, near enough for 32 bits
_LARGEST = 160
_TILES = 8  # worth a thread of their own
_FORBIDDEN = 2**29  # the cost of a state that no path may begin in


def encode(tiled: Tensor, bits: int, states: int) -> Tensor:
    """Packed tiles uint8 [..., n * bits / 8] of `tiled` [..., n], in levels (a weight over its
    scale).

    By Triton on a GPU; on a CPU by numba where it is installed, in `torch.get_num_threads()`
    threads; else by the slow twin. Raises `ValueError` for what is not finite, and for widths that
    there is no trellis for.
    """
    if tiled.device.type == "cuda":
        return _encode_gpu(tiled, bits, states)
    fast = compiled("trellis_numba")
    if fast is None or tiled.device.type != "cpu":
        return encode_slow(tiled, bits, states)
    rounded = _rounded(tiled, bits, states)
    given = rounded.flatten(0, -2)
    found = torch.empty_like(given)
    values, side = _values(states).numpy(), seam_of(given.shape[1])
    tiles, states_found = given.numpy(), found.numpy()
    in_parts(
        lambda a, b: fast.encode(tiles[a:b], values, bits, states, side, states_found[a:b]),
        len(given),
        _TILES,
    )
    return trellis.pack(found, bits).view(*tiled.shape[:-1], -1)


def _encode_gpu(tiled: Tensor, bits: int, states: int) -> Tensor:
    from .gpu.trellis_encode import encode as launches_of

    rounded = _rounded(tiled, bits, states).flatten(0, -2)
    launches, found = launches_of(
        rounded, _values(states).to(tiled.device), bits, states, seam_of(rounded.shape[1])
    )
    for launch in launches:
        launch.run()
    return trellis.pack(found, bits).view(*tiled.shape[:-1], -1)


def encode_slow(tiled: Tensor, bits: int, states: int) -> Tensor:
    """The same in plain torch, all tiles at once, on any device."""
    rounded = _rounded(tiled, bits, states).flatten(0, -2).flip(-1)
    values = _values(states).to(rounded.device)
    side = seam_of(rounded.shape[1])
    seam = torch.cat([rounded[:, -side:], rounded[:, :side]], 1)
    overlap = _walk(seam, values, bits, states, None)[:, side] >> bits
    path = _walk(rounded, values, bits, states, overlap).flip(-1)
    return trellis.pack(path, bits).view(*tiled.shape[:-1], -1)


def seam_of(length: int) -> int:
    """Weights to each side of the seam that the first pass runs over, of tiles of `length`."""
    return min(SEAM, length // 2)


def _rounded(tiled: Tensor, bits: int, states: int) -> Tensor:
    """int32: the tiles in steps of 1 / FINE level."""
    trellis.check(bits, states)
    if not tiled.shape[-1] or tiled.shape[-1] % 8:
        raise ValueError(f"a tile has a multiple of 8 weights; given {tuple(tiled.shape)}")
    if not bool(torch.isfinite(tiled).all()):
        raise ValueError("a trellis code needs finite weights and scales; given some that are not")
    clipped = tiled.detach().float().clamp(-_LARGEST, _LARGEST)
    return (clipped * FINE).round_().to(torch.int32).contiguous()


@functools.cache
def _values(states: int) -> Tensor:
    """int32 [2**states]: the level of each state, in steps of 1 / FINE level."""
    return trellis.level_of(torch.arange(2**states)).to(torch.int32) * FINE


def _walk(x: Tensor, values: Tensor, bits: int, states: int, start: Tensor | None) -> Tensor:
    """The cheapest states int64 [tiles, T] for `x` int32 [tiles, T], beginning and ending in
    `start`.

    `start` [tiles]: the high bits that a state shares with the one before it; None = any.
    """
    low, symbols = 1 << (states - bits), 1 << bits
    cost = torch.zeros(len(x), low, dtype=torch.int32, device=x.device)
    if start is not None:
        cost += _FORBIDDEN
        cost.scatter_(1, start[:, None], 0)
    came = torch.arange(symbols, dtype=torch.int32, device=x.device)[:, None]
    best = []
    for t in range(x.shape[1]):
        error = (x[:, t : t + 1] - values).square() << bits
        total = (cost.repeat_interleave(symbols, 1) + error).view(-1, symbols, low) + came
        least = total.amin(1)
        best.append(least & (symbols - 1))
        cost = least & -symbols
    at = cost.argmin(1) if start is None else start
    path = []
    for t in range(x.shape[1] - 1, -1, -1):
        state = best[t].gather(1, at[:, None])[:, 0].long() * low + at
        path.append(state)
        at = state >> bits
    return torch.stack(path[::-1], 1)
