"""Timings of every Triton kernel on a GPU, beside the time that no kernel can beat: operations over
the rate of the units, bytes over the bandwidth.

`seconds` times one specimen, `tune` makes `tiles.choose` answer with the tile that is fastest at a
shape. Both want a CUDA device; `floor` doesn't.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .gpu.linear_a8 import linear_a8
from .gpu.specimens import Specimen, names, specimen
from .gpu.tiles import FP8_TILES, TILES, Tile
from .gpu.tiles import tune as settle

#: Best rates seen on an H200 (gau-nernst's gn-kernels, README): operations a second by unit, and
#: bytes a second of a large copy.
H200 = {"int8": 1160e12, "fp8": 1085e12, "bf16": 763e12, "bytes": 4.055e12}


@dataclass(frozen=True)
class Timing:
    """`seconds`: median of `calls`; `spread`: from the lower to the upper quartile; `floor`: what
    the roofline allows.
    """

    name: str
    seconds: float
    spread: float
    floor: float
    calls: int

    @property
    def share(self) -> float:
        """Of the roofline that is reached, 1 at best."""
        return self.floor / self.seconds


def floor(made: Specimen, rates: Mapping[str, float] = H200) -> float:
    """Seconds that no kernel goes below: the slower of its operations and its bytes."""
    return max(made.operations / rates[made.unit], made.moved / rates["bytes"])


def seconds(name: str, rates: Mapping[str, float] = H200) -> Timing:
    """Time one specimen on the current CUDA device, the L2 cache emptied before each call. Raises
    `RuntimeError` without a device.
    """
    made = specimen(name, "cuda")

    def call() -> None:
        for launch in made.launches:
            launch.run()

    taken = _measure(call)
    low, middle, high = statistics.quantiles(taken, n=4)
    return Timing(name, middle, high - low, floor(made, rates), len(taken))


def all_seconds(rates: Mapping[str, float] = H200) -> list[Timing]:
    """`seconds` of every specimen."""
    return [seconds(name, rates) for name in names()]


def tune(m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> dict[Tile, float]:
    """Time the tiles of `linear_a8` at M, N, K on the current CUDA device; its launches at that
    shape take the fastest from now on.
    """
    rows, columns = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
    a, w = (
        torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
        for shape in ((m, k), (n, k))
    )
    a, w = (a, w) if dtype == torch.int8 else (a.to(dtype), w.to(dtype))

    def measure(tile: Tile) -> float:
        launches, _ = linear_a8(a, rows, None, None, w, columns, tile=tile)

        def run() -> None:
            for launch in launches:
                launch.run()

        return statistics.median(_measure(run))

    return settle(
        f"linear_a8 {dtype}", m, n, k, measure, TILES if dtype == torch.int8 else FP8_TILES
    )


def _measure(call: object) -> list[float]:
    import triton

    found: list[float] = triton.testing.do_bench(call, warmup=50, rep=200, return_mode="all")
    return [milliseconds * 1e-3 for milliseconds in found]
