"""Viterbi's algorithm for trellis codes: one program a tile, costs of all states in registers.

A step spreads the cost of each overlap to the states that begin with it, adds the squared error,
and takes the least over the predecessors, whose number stands in the lowest bits:
`trellis_encode.py`, whose codes these are, bit for bit. What came from where goes to scratch
memory, 2**(STATES - BITS) bytes a weight, and is read back from the end. A program takes tile after
tile, so that the scratch is one program's and not one tile's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import trellis
from .launching import Launch, processors

_FORBIDDEN = 2**29
_RESIDENT = 4  # programs a multiprocessor


@triton.jit
def _step(
    cost, x, values, came, best, BITS: tl.constexpr, LOW: tl.constexpr, SYMBOLS: tl.constexpr
):
    wide = tl.reshape(tl.broadcast_to(cost[:, None], (LOW, SYMBOLS)), (SYMBOLS, LOW))
    off = x - values
    least = tl.min(wide + came + ((off * off) << BITS), axis=0)
    tl.store(best + tl.arange(0, LOW), (least & (SYMBOLS - 1)).to(tl.uint8))
    return least & -SYMBOLS


@triton.jit
def _encode(
    tiles, levels, best, out, n, BITS: tl.constexpr, STATES: tl.constexpr, SEAM: tl.constexpr,
    LENGTH: tl.constexpr, FORBIDDEN: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    SYMBOLS: tl.constexpr = 1 << BITS
    LOW: tl.constexpr = 1 << (STATES - BITS)
    symbol, overlap = tl.arange(0, SYMBOLS), tl.arange(0, LOW)
    came = symbol[:, None]
    values = tl.load(levels + symbol[:, None] * LOW + overlap[None, :])
    own = best + tl.program_id(0).to(tl.int64) * (LENGTH * LOW)
    for tile in range(tl.program_id(0), n, PROGRAMS):
        x = tiles + tile * LENGTH
        cost = tl.zeros((LOW,), tl.int32)
        for t in range(2 * SEAM):  # backwards over the seam
            at = (SEAM - 1 - t + LENGTH) % LENGTH
            cost = _step(cost, tl.load(x + at), values, came, own + t * LOW, BITS, LOW, SYMBOLS)
        start = tl.argmin(cost, axis=0)
        tl.debug_barrier()
        for t in range(SEAM):
            back = tl.load(own + (2 * SEAM - 1 - t) * LOW + start).to(tl.int32)
            start = (back * LOW + start) >> BITS
        tl.debug_barrier()
        cost = tl.where(overlap == start, 0, FORBIDDEN)
        for t in range(LENGTH):
            at = LENGTH - 1 - t
            cost = _step(cost, tl.load(x + at), values, came, own + t * LOW, BITS, LOW, SYMBOLS)
        tl.debug_barrier()
        for t in range(LENGTH):
            back = tl.load(own + (LENGTH - 1 - t) * LOW + start).to(tl.int32)
            state = back * LOW + start
            tl.store(out + tile * LENGTH + t, state)
            start = state >> BITS
        tl.debug_barrier()


def encode(
    tiles: Tensor, levels: Tensor, bits: int, states: int, seam: int
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches and the states int32 [n, length] that they fill: what numba's `encode` finds.

    Args:
        tiles: int32 [n, length], in steps of which `levels` int32 [2**states] are.
        levels: the level of each state.
        bits: bits a weight.
        states: log2 of the number of states.
        seam: weights to each side of the seam in the first pass.

    Raises:
        ValueError: for shapes that don't fit.
    """
    trellis.check(bits, states)
    if tiles.dtype != torch.int32 or tiles.ndim != 2 or tiles.shape[1] < 2 * seam:
        raise ValueError(
            f"tiles are int32 [n, at least {2 * seam}]; given {tiles.dtype} {tuple(tiles.shape)}"
        )
    out = torch.empty_like(tiles)
    if not len(tiles):
        return (), out
    programs = min(len(tiles), _RESIDENT * processors(tiles))
    scratch = torch.empty(
        programs, tiles.shape[1], 2 ** (states - bits), dtype=torch.uint8, device=tiles.device
    )
    arguments = {
        "tiles": tiles.contiguous(), "levels": levels.contiguous(), "best": scratch, "out": out,
        "n": len(tiles), "BITS": bits, "STATES": states, "SEAM": seam, "LENGTH": tiles.shape[1],
        "FORBIDDEN": _FORBIDDEN, "PROGRAMS": programs,
    }  # fmt: skip
    warps = min(16, max(1, 2**states // 1024))
    return (Launch(_encode, (programs,), arguments, warps, 1),), out
