"""Timing the products of this CPU for the table: a second or two, once for a core and a torch.

Every way of every kind is called in turn, round after round, and the least time counts: what else
the machine does at the moment makes a call longer, never shorter. A way that is many times slower
than another is given up: a scalar loop would take minutes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, cpu_rounded, integer_sums, layout, products
from .product_table import ROWS, Table
from .weight import Weight

SIZE = 768  # inputs and outputs
_ROUNDS = 5
_HOPELESS = 4.0  # times as slow as the fastest way so far
_MANY = 64  # rows: what is hopeless for so many is not tried for more

Ways = dict[str, Callable[[Tensor], object]]


@torch.no_grad()
def timed() -> Table:
    """A table of this core with this torch and this number of threads."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        unsigned, exact = _exact()
        seconds: dict[str, dict[str, tuple[float, ...]]] = {}
        for inputs, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            seconds[f"keep {inputs}"] = _times(_keep(dtype), dtype)
        made = Table(unsigned, exact, seconds)
        with products.using(made):
            for kind, bits in (("wide", 8), ("narrow", 4)):
                seconds[kind] = _integer(made, bits)
        ways = made._replace(seconds=seconds)
        with products.using(ways):
            for inputs, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                for scheme, weight in (("W8", weight_of(8)), ("W4", weight_of(4)), ("W4 groups", weight_of(4, 64))):
                    seconds[f"{scheme} {inputs}"] = _times(_weight_only(weight, dtype, exact), dtype)
                for scheme, bits, activation in (("W8A8", 8, 8), ("W8A7", 8, 7), ("W4A8", 4, 8)):
                    call = _rounded(weight_of(bits), activation)
                    seconds[f"{scheme} {inputs}"] = _times({"rounded": call}, dtype)
        for scheme in ("W8", "W4", "W4 groups"):
            of = seconds[f"{scheme} bf16"]
            seconds[f"{scheme} fp16"] = {way: times for way, times in of.items() if way != "bf16"}
        return Table(unsigned, exact, seconds)


def weight_of(bits: int, group: int = 0, *, rows: int = SIZE, columns: int = SIZE) -> Weight:
    """A symmetric weight of normal numbers, rounded to the grid of each row's (or group's) largest.

    How long a product takes depends on what is in it where a core saturates (`saturation.py`), and
    uniform codes, of which a quarter of all pairs exceed, are like no layer's.
    """
    values = torch.randn(rows, columns)
    whole = values.unflatten(-1, (-1, group)) if group else values[:, None]
    scale = whole.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = (whole / scale).round().add(2 ** (bits - 1)).flatten(1).to(torch.uint8)
    packed = layout.pack(codes, bits)
    stored = layout.signed(packed) if bits == 8 else packed
    return Weight(stored, scale[..., 0].half(), None, 2.0 ** (bits - 1), None, bits, columns, group)


def _exact() -> tuple[bool, dict[str, str]]:
    """Whether activations are uint8, and what each integer product is exact for with them."""
    found: dict[str, str] = {
        name: integer_sums.exactness(name, torch.uint8) for name in integer_sums.PRODUCTS
    }
    if found["int_mm"] or found["onednn"]:
        return True, found
    signed = integer_sums.exactness("int_mm", torch.int8)
    return False, {"int_mm": signed, "onednn": "", "fp32": "all"}


def _integer(table: Table, bits: int) -> dict[str, tuple[float, ...]]:
    """Seconds of the integer products that are exact for weights of so many bits."""
    weight, narrow, ways = weight_of(bits), bits < 8, {}
    for name, exact in table.exact.items():
        whole = name == "fp32" or exact == "all" or (narrow and exact == "pairs")
        if whole or exact == "pairs":
            way = name if whole else f"{name} + rest"
            ways[way] = _product(weight, way, table.unsigned)
    return _times(ways, torch.uint8 if table.unsigned else torch.int8)


def _product(weight: Weight, way: str, unsigned: bool) -> Callable[[Tensor], object]:
    totals = cpu_rounded.row_sums(weight)

    def call(codes: Tensor) -> object:
        column = torch.ones(len(codes), 1)
        rows = cpu_rounded.Bytes(codes, column, column, column, 255 if unsigned else 128)
        return cpu_rounded.product(rows, weight, None, torch.float32, totals, way=way)

    return call


def _weight_only(weight: Weight, dtype: torch.dtype, exact: dict[str, str]) -> Ways:
    ways = ["digits"] if exact["int_mm"] == "all" and cpu_rounded.in_bytes(weight) else []
    ways += ["fp32"] + (["bf16"] if dtype == torch.bfloat16 else [])

    def by(way: str) -> Callable[[Tensor], object]:
        return lambda x: cpu.linear_by(way, x, weight, None)

    return {way: by(way) for way in ways}


def _rounded(weight: Weight, activation: int) -> Callable[[Tensor], object]:
    return lambda x: cpu.linear_rounded(x.view_as(x), weight, None, activation, None, None)


def _keep(dtype: torch.dtype) -> Ways:
    weight = torch.randn(SIZE, SIZE)
    own = weight.to(dtype)
    ways: Ways = {"fp32": lambda x: F.linear(x.float(), weight)}
    if dtype != torch.float32:
        ways["bf16" if dtype == torch.bfloat16 else "fp16"] = lambda x: F.linear(x, own)
    return ways


def _times(ways: Ways, dtype: torch.dtype) -> dict[str, tuple[float, ...]]:
    """Way -> its least seconds at each of `ROWS`, of rows of `dtype`."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    lost: set[str] = set()
    for count in ROWS:
        x = torch.randint(0, 128, (count, SIZE)).to(dtype)
        x = x / 64 - 1 if dtype.is_floating_point else x
        best = dict.fromkeys(ways, math.inf)
        left = {way: call for way, call in ways.items() if way not in lost}
        for call in left.values():
            call(x)  # what is worked out once, and memory that is new
        for turn in range(_ROUNDS):
            for way, call in list(left.items()):
                best[way] = min(best[way], _seconds(call, x))
                if turn and best[way] > _HOPELESS * min(best.values()):
                    del left[way]
        for way in ways:
            found[way].append(best[way])
            if count >= _MANY and way not in left:
                lost.add(way)
    return {way: tuple(times) for way, times in found.items()}


def _seconds(call: Callable[[Tensor], object], x: Tensor) -> float:
    """Of one call by the clock; of its threads' work where that is less: others were served."""
    wall, work = time.perf_counter(), time.process_time()
    call(x)
    return min(time.perf_counter() - wall, time.process_time() - work)
