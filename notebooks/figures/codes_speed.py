"""What codes cost in time on a CPU core: encoding, decoding, and a rotation beside its product.

    python notebooks/figures/codes_speed.py [--repeats 7] [--tiles 120]

CPU seconds of this process on one thread, the least of some repeats. `encode`: microseconds a
weight of Viterbi's algorithm, both passes, Gaussian tiles of 256. `decode`: nanoseconds a weight of
1152 x 4608 into int8. `rotate`: the rotation of bf16 rows (milliseconds), that of a rotation with
rounding over rounding alone, and both over the int8 product that follows, at shapes of PixArt-alpha
(512 pixels, batch 2) and SDXL (1024 pixels, batch 2). Writes codes_speed.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from figure import publish

from qsearch_kernels import cpu_rounded, cpu_rows, hadamard, trellis, trellis_cpu
from qsearch_kernels.trellis_encode import encode
from qsearch_kernels.weight import Weight

#: name -> (rows of activations, input channels, outputs)
SHAPES = {
    "PixArt q, k, v": (2048, 1152, 1152),
    "PixArt ff in": (2048, 1152, 4608),
    "PixArt ff out": (2048, 4608, 1152),
    "SDXL 640 q, k, v": (8192, 640, 640),
    "SDXL 640 ff in": (8192, 640, 5120),
    "SDXL 1280 q, k, v": (2048, 1280, 1280),
    "SDXL 1280 ff in": (2048, 1280, 10240),
    "SDXL 1280 ff out": (2048, 5120, 1280),
}


def least(call: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of the fastest of some calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiles", type=int, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dice = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []

    def note(what: str, case: str, value: float, unit: str, over: float | None = None) -> None:
        more = {"over the product": "" if over is None else f"{over:.3f}"}
        rows.append({"what": what, "case": case, "value": value, "unit": unit} | more)
        print(rows[-1], flush=True)

    for states in trellis.STATES:
        for bits in trellis.BITS:
            tiles = torch.randn(options.tiles, 256, generator=dice) * trellis.DEVIATION
            spent = least(partial(encode, tiles, bits, states), 3)
            note("encode", f"tcq{bits} 2^{states}", spent / tiles.numel() * 1e6, "µs a weight")
    for bits in trellis.BITS:
        shape = trellis.packed_shape(1152, 4608, bits)
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=dice)
        out = torch.empty(1152, 4608, dtype=torch.int8)
        spent = least(partial(trellis_cpu.decode_into, packed, bits, 12, out), options.repeats)
        note("decode", f"tcq{bits} 2^12", spent / out.numel() * 1e9, "ns a weight")
    for name, (count, channels, outputs) in SHAPES.items():
        x = torch.randn(count, channels, generator=dice).bfloat16()
        group = hadamard.group_of(channels)
        levels = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8, generator=dice)
        weight = Weight(levels, torch.ones(outputs, 1), None, 128.0, None, 8, channels, 0)
        sums = cpu_rounded.row_sums(weight)
        codes = cpu_rows.rows_of(x, 8, None, None, sums=False)
        repeats = options.repeats
        product = least(
            partial(cpu_rounded.product, codes, weight, None, torch.bfloat16, sums),
            repeats,
        )
        rounding = least(partial(cpu_rows.rows_of, x, 8, None, None, sums=False), repeats)
        turning = least(partial(hadamard.rotate, x, group), repeats)
        both = least(partial(hadamard.rotated_rows, x, group, 8, None, None, sums=False), repeats)
        case = f"{name}, {count} x {channels} x {outputs}, groups of {group}"
        note("int8 product", case, product * 1e3, "ms")
        note("rotate", case, turning * 1e3, "ms", turning / product)
        note("round", case, rounding * 1e3, "ms", rounding / product)
        note("rotate and round", case, both * 1e3, "ms", both / product)
    publish(__file__, rows, title="Codes and rotations on one CPU core", seed=0)


if __name__ == "__main__":
    main()
