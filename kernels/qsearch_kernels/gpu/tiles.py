"""Tiles: how a product is cut up for the multiprocessors, from a table and a count of waves, or
from a stopwatch.

A product of M rows and N columns makes ceil(M / m) * ceil(N / n) tiles; the multiprocessors take
them in waves, and the last one is seldom full. Big tiles read less for what they compute, small
ones waste less of that wave: with M = 2048, N = 1152 and 132 processors, 128 x 128 leaves 45 %
idle, 64 x 64 leaves 13 %. `choose` weighs the two by the table's rates, which are estimates until
`tune` has measured the shape on the GPU at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`m` x `n` outputs from `k` inputs at a time; `warps` a program, loads `stages` deep; `rate`:
    speed within a full wave, of the best tile's.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    rate: float


#: For 8-bit operands. Shared memory: (m + n) * k * stages bytes, of 227 KB. The rates are
#: estimates, from published timings of similar kernels.
TILES = (
    Tile(128, 256, 128, 8, 3, 1.00),
    Tile(128, 128, 128, 8, 4, 0.90),
    Tile(128, 64, 128, 4, 4, 0.75),
    Tile(64, 128, 128, 4, 4, 0.75),
    Tile(64, 64, 128, 4, 4, 0.55),
)
#: For fp8, whose sums are promoted: a second set of accumulators stands beside the first, and the
#: widest tile would spill.
FP8_TILES = TILES[1:]
#: For weights that are unpacked on the way: registers hold what they are unpacked from besides.
UNPACKING_TILES = (
    Tile(128, 128, 128, 8, 3, 0.90),
    Tile(128, 64, 128, 4, 3, 0.75),
    Tile(64, 64, 128, 4, 3, 0.55),
)
#: For groups with zeros as well: two sets of sums and their corrections spill registers in anything
#: larger.
CORRECTING_TILES = UNPACKING_TILES[2:]
_MEASURED: dict[tuple[str, int, int, int], Tile] = {}


def seconds_of(tile: Tile, m: int, n: int, processors: int) -> float:
    """Relative time of a product with M = m and N = n: waves times the work of a tile."""
    tiles = -(-m // tile.m) * -(-n // tile.n)
    return -(-tiles // processors) * tile.m * tile.n / tile.rate


def choose(
    kernel: str, m: int, n: int, k: int, processors: int, tiles: tuple[Tile, ...] = TILES
) -> Tile:
    """The tile measured best for this kernel and shape, else the one that takes least time by the
    table.
    """
    return _MEASURED.get((kernel, m, n, k)) or min(
        tiles, key=lambda tile: seconds_of(tile, m, n, processors)
    )


def tune(
    kernel: str,
    m: int,
    n: int,
    k: int,
    measure: Callable[[Tile], float],
    tiles: tuple[Tile, ...] = TILES,
) -> dict[Tile, float]:
    """Time every tile with `measure` (seconds), and let `choose` answer with the fastest from now
    on, in this process.
    """
    taken = {tile: measure(tile) for tile in tiles}
    _MEASURED[kernel, m, n, k] = min(taken, key=taken.__getitem__)
    return taken
