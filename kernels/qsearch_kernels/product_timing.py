"""Timing the products of this CPU for the table: a second or two, once for a core and a torch.

Every way of every kind is called in turn, round after round, and the least time counts: what else
the machine does at the moment makes a call longer, never shorter. A way that is many times slower
than another is given up: a scalar loop would take minutes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bench, cpu, cpu_rounded, cpu_rows, integer_sums, products
from .product_table import ROWS, SHAPES, Table
from .weight import Weight

_ROUNDS = 5
_LONG = 1024  # rows from which three rounds are enough
_HOPELESS = 4.0  # times as slow as the fastest way so far
_MANY = 64  # rows: what is hopeless for so many is not tried for more

_LARGE = [shape for shape in SHAPES[: len(ROWS)] if shape[0] >= _MANY]  # many rows, a large weight
Ways = dict[str, Callable[[Tensor], object]]
Shape = tuple[int, int, int]  # rows, inputs, outputs
_BF16 = ("bf16", "bf16 tiles", "int8pack")  # ways of bf16 inputs alone
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def timed() -> Table:
    """A table of this core with this torch and this number of threads."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        unsigned, exact = _exact()
        seconds: dict[str, dict[str, tuple[float, ...]]] = {}
        made = Table(unsigned, exact, seconds)
        for inputs, dtype in _TYPES.items():
            seconds[f"keep {inputs}"] = _times(partial(_keep, dtype), dtype)
        with products.using(made):
            for kind, bits in (("wide", 8), ("narrow", 4)):
                seconds[kind] = _times(partial(_integer, made, bits), torch.float32)
            for inputs in ("fp32", "bf16"):
                dtype = _TYPES[inputs]
                for scheme, bits, group in (("W8", 8, 0), ("W4", 4, 0), ("W4 groups", 4, 64)):
                    ways = partial(_weight_only, bits, group, dtype)
                    seconds[f"{scheme} {inputs}"] = _times(ways, dtype)
                for scheme, bits, activation in (("W8A8", 8, 8), ("W8A7", 8, 7), ("W4A8", 4, 8)):
                    ways = partial(_rounded, bits, activation)
                    seconds[f"{scheme} {inputs}"] = _times(ways, dtype)
            for scheme in products.SCHEMES:  # fp16 inputs: as bf16 ones, but for the bf16 GEMM
                times = seconds[f"{scheme} bf16"]
                seconds[f"{scheme} fp16"] = {way: t for way, t in times.items() if way not in _BF16}
        return made


def _exact() -> tuple[bool, dict[str, str]]:
    """Whether activations are uint8, and what each integer product is exact for with them."""
    found: dict[str, str] = {
        name: integer_sums.exactness(name, torch.uint8) for name in integer_sums.PRODUCTS
    }
    if found["int_mm"] or found["onednn"] or found["madd"]:
        return True, found
    signed = integer_sums.exactness("int_mm", torch.int8)
    return False, {"int_mm": signed, "onednn": "", "madd": "", "vnni": "", "fp32": "all"}


def _weight(bits: int, shape: Shape, group: int = 0) -> Weight:
    _, inputs, outputs = shape
    return bench.random_weight(outputs, inputs, bits, group=group)


def _integer(table: Table, bits: int, shape: Shape) -> Ways:
    """The integer products that are exact for weights of so many bits, rounding included."""
    weight, narrow, ways = _weight(bits, shape), bits < 8, {}
    for name, exact in table.exact.items():
        whole = name == "fp32" or exact == "all" or (narrow and exact == "pairs")
        if name == "vnni" and not narrow and shape in _LARGE:
            continue  # for many rows of bytes, oneDNN's product is the same and packs better
        if whole or exact == "pairs":
            way = name if whole else f"{name} + rest"
            ways[way] = _product(weight, way)
    return ways


def _product(weight: Weight, way: str) -> Callable[[Tensor], object]:
    totals = cpu_rounded.row_sums(weight)

    def call(x: Tensor) -> object:
        if cpu.in_one_call(way, weight, len(x)):
            return cpu_rounded.few_rows(x, weight, None, 8, None, None, way)
        rows = cpu_rows.rows_of(x, 8, None, None, sums=cpu_rounded.uneven(weight))
        return cpu_rounded.product(rows, weight, None, torch.float32, totals, way=way)

    return call


def _weight_only(bits: int, group: int, dtype: torch.dtype, shape: Shape) -> Ways:
    weight = _weight(bits, shape, group)

    def by(way: str) -> Callable[[Tensor], object]:
        return lambda x: cpu.linear_by(way, x, weight, None)

    return {way: by(way) for way in cpu.weight_ways(weight, shape[0], dtype)}


def _rounded(bits: int, activation: int, shape: Shape) -> Ways:
    weight = _weight(bits, shape)

    def call(x: Tensor) -> object:
        own = x.view_as(x)  # a tensor object each: layers that are given one round it once
        return cpu.linear_rounded(own, weight, None, activation, None, None)

    return {"rounded": call}


def _keep(dtype: torch.dtype, shape: Shape) -> Ways:
    weight = torch.randn(shape[2], shape[1])
    own = weight.to(dtype)
    ways: Ways = {"fp32": lambda x: F.linear(x.float(), weight)}
    if dtype != torch.float32:
        ways["bf16" if dtype == torch.bfloat16 else "fp16"] = lambda x: F.linear(x, own)
    return ways


def _times(make: Callable[[Shape], Ways], dtype: torch.dtype) -> dict[str, tuple[float, ...]]:
    """Way -> its least seconds at each of `SHAPES`, of rows of `dtype`."""
    found: dict[str, list[float]] = {}
    lost: set[str] = set()
    for place, shape in enumerate(SHAPES):
        count, inputs, _ = shape
        if not place or shape[1:] != SHAPES[place - 1][1:]:
            ways = make(shape)
        x = (torch.randint(0, 128, (count, inputs)) / 64 - 1).to(dtype)
        best = dict.fromkeys(ways, math.inf)
        left = {way: call for way, call in ways.items() if way not in lost}
        for call in left.values():
            call(x)  # what is worked out once, and memory that is new
        for turn in range(_ROUNDS if count < _LONG else 3):
            for way, call in list(left.items()):
                best[way] = min(best[way], _seconds(call, x))
                if turn and best[way] > _HOPELESS * min(best.values()):
                    del left[way]
        for way in ways:
            found.setdefault(way, [math.inf] * len(SHAPES))[place] = best[way]
            if count >= _MANY and way not in left:
                lost.add(way)
    return {way: tuple(times) for way, times in found.items()}


def _seconds(call: Callable[[Tensor], object], x: Tensor) -> float:
    """Of one call by the clock; of its threads' work where that is less: others were served."""
    wall, work = time.perf_counter(), time.process_time()
    call(x)
    return min(time.perf_counter() - wall, time.process_time() - work)
