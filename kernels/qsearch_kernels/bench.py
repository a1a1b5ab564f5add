"""Stopwatch: contenders timed in turn, round after round, so that a machine that slows down slows
them all.

    python -m qsearch_kernels.bench [--seconds 1] [--compiled]

prints the products of a CPU (or of CUDA) at the shapes of diffusion transformers and U-Nets: rows x
inputs x outputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import integer_sums, layout, ops, products
from .weight import Weight

#: (rows, inputs, outputs): a modulation for one picture, attention and feed-forward of 256 tokens,
#: a U-Net's attention of 4096
SHAPES = ((1, 1152, 6912), (256, 1152, 1152), (256, 1152, 4608), (4096, 640, 640))
_LEAST = 5  # rounds, however long they take
_HOPELESS = 8.0  # times as slow as the fastest: what is called in the first round alone


def race(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Name -> seconds of each call; one call of every contender a round, for at least `seconds`
    each in the mean and five rounds, after one that is not counted. A contender that is `_HOPELESS`
    times slower than the fastest is called in the first round alone.

    `clock`: `time.process_time` counts the seconds of the cores that worked, for a machine that
    others use at the same time.
    """
    wait: Callable[[], object] = (
        torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    )
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    began = time.perf_counter()
    while max(map(len, taken.values())) < _LEAST or time.perf_counter() - began < seconds * len(
        contenders
    ):
        fastest = min((min(times) for times in taken.values() if times), default=math.inf)
        for name, call in contenders.items():
            if taken[name] and min(taken[name]) > _HOPELESS * fastest:
                continue
            wait()
            start = clock()
            call()
            wait()
            taken[name].append(clock() - start)
    return taken


def random_weight(
    rows: int, columns: int, bits: int, *, group: int = 0, device: str = "cpu"
) -> Weight:
    """A symmetric weight of normal numbers, rounded to nearest between the ends of each row or
    group.

    What is in a weight matters for time where a core saturates (`saturation.py`): of uniform codes
    a quarter of all pairs exceed, of a layer's one in a hundred.
    """
    wide = group or columns
    values = F.pad(torch.randn(rows, columns), (0, -columns % wide)).unflatten(-1, (-1, wide))
    scale = values.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1 or 1)
    codes = (
        (values / scale)
        .round()
        .add(2 ** (bits - 1))
        .clamp(0, 2**bits - 1)
        .flatten(1)[:, :columns]
        .to(torch.uint8)
    )
    packed = layout.pack(codes.contiguous(), bits)
    stored = layout.signed(packed) if bits == 8 else packed
    return Weight(
        stored.to(device),
        scale[..., 0].half().to(device),
        None,
        2.0 ** (bits - 1),
        None,
        bits,
        columns,
        group,
    )


def contenders(
    m: int, k: int, n: int, device: str = "cpu", *, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """Products of `m` rows with an [n, k] weight: full precision, ours and, where they are
    installed, torchao's and gemlite's, each with its own copy of the weight.

    On CUDA ours take the rounding of their input with them, each time: no contender is given a
    tensor that another has rounded already.
    """
    x, weight = torch.randn(m, k, device=device), torch.randn(n, k, device=device) / k**0.5
    short, narrow = x.bfloat16(), weight.bfloat16()
    byte, nibble, grouped = (
        random_weight(n, k, bits, group=group, device=device)
        for bits, group in ((8, 0), (4, 0), (4, 64))
    )
    made: dict[str, Callable[[], object]] = {
        "fp32": lambda: F.linear(x, weight),
        "bf16": lambda: F.linear(short, narrow),
        "W8A8": _rounding(x, byte),
        "W8A8, bf16 in": _rounding(short, byte),
        "W4A8": _rounding(x, nibble),
        "W8, fp32 in": lambda: ops.linear(x, byte),
        "W8, bf16 in": lambda: ops.linear(short, byte),
        "W4, fp32 in": lambda: ops.linear(x, nibble),
        "W4, bf16 in": lambda: ops.linear(short, nibble),
        "W4 g64, fp32 in": lambda: ops.linear(x, grouped),
    }
    if torch.device(device).type == "cuda":  # a CPU has no product of bytes for groups
        made |= {
            "W4A8, bf16 in": _rounding(short, nibble),
            "W4A8 g64, bf16 in": _rounding(short, grouped),
            "W4 g64, bf16 in": lambda: ops.linear(short, grouped),
        }
    if compiled:
        dense = torch.compile(F.linear)
        made |= {
            "fp32 compiled": lambda: dense(x, weight),
            "bf16 compiled": lambda: dense(short, narrow),
        }
        rounded = torch.compile(ops.linear_rounded)
        made |= {
            f"W8A8, {kind} in, compiled": _rounding(given, byte, rounded)
            for kind, given in (("fp32", x), ("bf16", short))
        }
    return made | _torchao(m, k, n, device, compiled) | _gemlite(m, k, n, device)


def _rounding(
    x: torch.Tensor, weight: Weight, call: Callable[..., object] = ops.linear_rounded
) -> Callable[[], object]:
    own = x.clone()
    return lambda: call(own, weight, None, 8)


def _torchao(
    m: int, k: int, n: int, device: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    """torchao's dynamic int8 and its weight-only int8, eager and compiled."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    made: dict[str, Callable[[], object]] = {}
    for kind, config in (
        ("W8A8", Int8DynamicActivationInt8WeightConfig),
        ("W8", Int8WeightOnlyConfig),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            layer = torch.nn.Sequential(
                torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)
            )
            quantize_(layer, config())
            runs: Callable[[Any], object] = torch.compile(layer) if compiled else layer
            x = torch.randn(m, k, device=device, dtype=dtype)
            name = (
                f"torchao {kind}, {'fp32' if dtype == torch.float32 else 'bf16'} "
                f"in{', compiled' if compiled else ''}"
            )
            made[name] = lambda runs=runs, x=x: _no_grad(runs, x)  # type: ignore[misc]
    return made


def _gemlite(m: int, k: int, n: int, device: str) -> dict[str, Callable[[], object]]:
    """gemlite's dynamic int8 and its weight-only int4, as its helpers make them. Written against
    the source of gemlite 0.6.0.post2; it asks for a GPU when it is imported.
    """
    if torch.device(device).type != "cuda" or importlib.util.find_spec("gemlite") is None:
        return {}
    from gemlite.helper import A16W4_HQQ_INT, A8W8_int8_dynamic

    x, weight = (
        torch.randn(m, k, device=device).bfloat16(),
        (torch.randn(n, k, device=device) / k**0.5).bfloat16(),
    )
    made: dict[str, Callable[[], object]] = {}
    layers = {"W8A8": A8W8_int8_dynamic(device=device, dtype=torch.bfloat16).from_weights(weight)}
    if k % 64 == 0:
        codes, scale = (
            torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device),
            torch.rand(n, k // 64, device=device).add(0.5).div(16).bfloat16(),
        )
        layers["W4 g64"] = A16W4_HQQ_INT(device=device, dtype=torch.bfloat16).from_weights(
            codes, scale, torch.full_like(scale, 8)
        )
    for name, layer in layers.items():
        made[f"gemlite {name}, bf16 in"] = lambda layer=layer: _no_grad(layer, x)  # type: ignore[misc]
    return made


@torch.no_grad()
def _no_grad(call: Callable[[Any], object], x: torch.Tensor) -> object:
    return call(x)


def ceilings(
    device: str = "cpu", seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """What this machine reaches at best, measured: operations a second of large products in `int8`
    and in `float` (fp32 or bf16, what is faster), `bytes` read a second.
    """
    size = 1024 if device == "cpu" else 8192
    x = torch.randn(size, size, device=device)
    short, byte = (
        x.bfloat16(),
        torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device),
    )
    long = torch.ones(2**26 if device == "cpu" else 2**30, device=device)
    calls: dict[str, Callable[[], object]] = {
        "fp32": lambda: x @ x,
        "bf16": lambda: short @ short,
        "int8": _int8(byte, device),
        "sum": long.sum,
    }
    best = {name: min(times) for name, times in race(calls, seconds, device, clock).items()}
    return {
        "int8": 2 * size**3 / best["int8"],
        "float": 2 * size**3 / min(best["fp32"], best["bf16"]),
        "bytes": 4 * long.numel() / best["sum"],
    }


def _int8(matrix: torch.Tensor, device: str) -> Callable[[], object]:
    """The fastest product of bytes here, of those that `products` takes for weights whose products
    add up in 16 bits.
    """
    if torch.device(device).type != "cpu":
        other = matrix.t().contiguous().t()
        return lambda: torch._int_mm(matrix, other)
    found = products.table()
    half, codes = matrix // 2, matrix.clamp(min=0)
    sums = integer_sums.PRODUCTS[products.way("narrow", len(matrix))](half, 127 * 64)
    given = codes.to(torch.uint8) if found.unsigned else codes
    return lambda: sums(given)


def floor(name: str, m: int, k: int, n: int, rates: Mapping[str, float]) -> float:
    """Seconds that no product of this name goes below (the roofline): the slower of its operations
    and of the bytes of weight, input and output.
    """
    bits = (
        32
        if name.startswith("fp32")
        else 16
        if name.startswith("bf16")
        else 4
        if "W4" in name
        else 8.0
    )
    bits += 16 / 64 if "g64" in name else 0  # a scale of 16 bits for 64 weights
    short = 2 if "bf16" in name else 4
    return max(
        2 * m * k * n / rates["int8" if "A8" in name else "float"],
        (n * k * bits / 8 + short * m * (k + n)) / rates["bytes"],
    )


def table(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    device: str = "cpu",
    seconds: float = 1.0,
    *,
    compiled: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row a shape and contender: median, fastest and slowest in ms, how many times as fast as
    fp32 and bf16 by the medians, and the share of the roofline.
    """
    rows, rates = [], ceilings(device, seconds, clock)
    for m, k, n in shapes:
        taken = race(contenders(m, k, n, device, compiled=compiled), seconds, device, clock)
        middle = {name: statistics.median(times) for name, times in taken.items()}
        for name, times in taken.items():
            row = {
                "rows x in x out": f"{m} x {k} x {n}",
                "product": name,
                "ms": middle[name] * 1e3,
                "fastest": min(times) * 1e3,
                "slowest": max(times) * 1e3,
            }
            row |= {
                "x fp32": middle["fp32"] / middle[name],
                "x bf16": middle["bf16"] / middle[name],
            }
            rows.append(
                row
                | {"of roofline": floor(name, m, k, n, rates) / middle[name], "runs": len(times)}
            )
    return rows


def main() -> None:
    """Time the products and print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--compiled", action="store_true", help="torch.compile beside eager")
    options = parser.parse_args()
    for row in table(device=options.device, seconds=options.seconds, compiled=options.compiled):
        print("  ".join(f"{v:9.3f}" if isinstance(v, float) else f"{v!s:24}" for v in row.values()))


if __name__ == "__main__":
    main()
