"""Products of a CPU on every instruction set that it has: ours, fp32, bf16 and torch's own int8.

    python notebooks/figures/products.py [--seconds 1] [--threads 1] [--levels native avx2 ...]
    [--name avx2-2]

Each level is a process of its own, whose core is capped (levels.py). In it all contenders are
called in turn, round after round, and the least time counts, in seconds that the process worked:
other processes on the machine make a call longer, never shorter. torch's own int8 layers are
checked for exactness beside: `exact` is what their integer sums are exact for. Weights are normal
numbers rounded to nearest. Written to products.json, or products-NAME.json.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from figure import publish
from levels import LEVELS, found_at, hand_back

from qsearch_kernels import bench, integer_sums, ops, product_table, products

SHAPES = ((1, 1152, 6912), (16, 1152, 1152), (256, 1152, 1152), (256, 1152, 4608), (4096, 640, 640))
Calls = dict[str, Callable[[], object]]
_LEAST, _SLOW = 3, 8  # rounds; times as slow as fp32 from where on three rounds are enough


def ours(m: int, k: int, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = torch.randn(m, k).to(dtype)
        for scheme, bits, group, activation in (
            ("W8A8", 8, 0, 8), ("W8A7", 8, 0, 7), ("W4A8", 4, 0, 8), ("W8", 8, 0, None),
            ("W4", 4, 0, None), ("W3", 3, 0, None), ("W4 g64", 4, 64, None),
        ):  # fmt: skip
            weight = bench.random_weight(n, k, bits, group=group)
            if activation is None:
                yield f"{scheme}, {name} in", lambda x=x, w=weight: ops.linear(x, w)  # type: ignore[misc]
            else:  # a tensor object each: layers that are given one round it once
                yield (
                    f"{scheme}, {name} in",
                    lambda x=x, w=weight, a=activation: ops.linear_rounded(
                        x.view_as(x), w, None, a
                    ),  # type: ignore[misc]
                )


def torchs(m: int, k: int, n: int) -> Calls:
    """torch's own int8 layers: rounding of the input included where they do it themselves."""
    x, weight = torch.randn(m, k), torch.randn(n, k)
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    unsigned = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    made: Calls = {"torch._int_mm, product alone": lambda: torch._int_mm(unsigned, codes.t())}
    onednn = integer_sums.onednn(codes, 1)
    made["oneDNN qlinear, product alone"] = lambda: onednn(unsigned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated in torch 2.13
        zeros = torch.zeros(n, dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    dynamic = torch.ops.quantized.linear_dynamic
    made["FBGEMM linear_dynamic"] = lambda: dynamic(x, packed, False)
    return made


def contenders(m: int, k: int, n: int) -> Calls:
    x, weight = torch.randn(m, k), torch.randn(n, k) / k**0.5
    short, narrow = x.bfloat16(), weight.bfloat16()
    made: Calls = {"fp32": lambda: F.linear(x, weight), "bf16": lambda: F.linear(short, narrow)}
    return made | dict(ours(m, k, n)) | torchs(m, k, n)


def times(calls: Calls, seconds: float) -> dict[str, float]:
    """Name -> least seconds of one call, by the clock or of the process where that is less."""
    best = dict.fromkeys(calls, float("inf"))
    began, rounds = time.perf_counter(), 0
    while rounds < _LEAST or time.perf_counter() - began < seconds * len(calls):
        for name, call in calls.items():
            if rounds < _LEAST or best[name] < _SLOW * best["fp32"]:
                wall, work = time.perf_counter(), time.process_time()
                call()
                taken = min(time.perf_counter() - wall, time.process_time() - work)
                best[name] = min(best[name], taken)
        rounds += 1
    return best


@torch.no_grad()
def level(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one level, in the process that is capped to it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    exact, rows = products.table().exact, []
    for shape in SHAPES:
        best = times(contenders(*shape), options.seconds)
        keep = min(best["fp32"], best["bf16"])
        for product, taken in best.items():
            scheme = product.partition(",")[0]
            kind = {"W4 g64": "W4 groups", "W3": "W4"}.get(scheme, scheme)
            served, alone = "", {"torch._int_mm": "int_mm", "oneDNN qlinear": "onednn"}.get(scheme)
            if "A8" in kind or "A7" in kind:
                served = products.way("wide" if kind == "W8A8" else "narrow", shape[0])
            elif kind in products.SCHEMES:
                inputs = "bf16" if "bf16" in product else "fp32"
                served = products.way(f"{kind} {inputs}", shape[0])
            rows.append(
                {
                    "level": name, "rows x in x out": " x ".join(map(str, shape)),
                    "product": product, "served by": served, "exact": exact[alone] if alone else "",
                    "ms": taken * 1e3, "x fp32": best["fp32"] / taken,
                    "x bf16": best["bf16"] / taken,
                    "x keep": keep / taken,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender and shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--name", default="", help="of this core and its threads")
    parser.add_argument("--inside", choices=list(LEVELS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        hand_back([level(options.inside, options), product_table.core()])
        return
    rows, cores = [], {}
    for name in options.levels:
        words = ["--seconds", str(options.seconds), "--threads", str(options.threads)]
        found, cores[name] = found_at(name, __file__, words)
        rows += found
    script = f"products-{options.name}.py" if options.name else "products.py"
    publish(
        str(Path(__file__).with_name(script)), rows,
        title=f"products on every instruction set, {options.threads} thread",
        seed=0, extra={"cores": cores, "clock": "least of wall and process seconds"},
    )  # fmt: skip


if __name__ == "__main__":
    main()
