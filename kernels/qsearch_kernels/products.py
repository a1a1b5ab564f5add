"""Which product serves which scheme on this CPU: timed once, checked for exactness, kept on disk.

An int8 GEMM that is four times as fast as fp32 on a core with VNNI is forty times as slow where
torch has only a scalar loop for it, and a bf16 GEMM without bf16 units is six times as slow as
fp32. So nothing is assumed of a core: for each kind of product and range of rows, every way that
this torch has is timed for a few milliseconds, for many rows at a large weight and a small one
(`product_table.SHAPES`), and the fastest one that is exact here (`integer_sums.exactness`) is taken
from then on.

The table lies in `$XDG_CACHE_HOME/qsearch` (or `~/.cache/qsearch`), under the core's name, torch's
version, what caps the core's instructions, and the number of threads; another core makes its own.
`QSEARCH_PRODUCTS=reference` computes everything with the plain twins in `reference.py`;
`QSEARCH_PRODUCTS=int_mm`, `onednn`, `madd`, `vnni` or `fp32` leaves only that integer product,
where it is exact.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import integer_sums
from .product_table import ROWS, SHAPES, Table, keep, load
from .weight import Weight

_ENDS = (1, 16, 128, 512)  # of the ranges that the entries of `ROWS` stand for
_SMALL = 384 * 384  # weights of a layer that is taken for a small one
#: schemes that a table says the worth of, each with fp32 and with bf16 inputs
SCHEMES = ("W8A8", "W8A7", "W4A8", "W8", "W4", "W4 groups")
_FORCED = "QSEARCH_PRODUCTS"
_LOCK = threading.RLock()


_TABLES: dict[tuple[int, str], Table] = {}
#: threads, what is forced, kind, place in `SHAPES`, ways that are possible -> way
_CHOSEN: dict[tuple[int, str, str, int, tuple[str, ...]], str] = {}


def place_of(rows: int, weights: int | None = None) -> int:
    """The place in `SHAPES` that stands for so many rows (1, 2 to 16, to 128, to 512, more) and a
    layer of so many weights; None = a large one.
    """
    place = bisect.bisect_left(_ENDS, rows)
    small = weights is not None and weights <= _SMALL and ROWS[place] >= SHAPES[len(ROWS)][0]
    return place + len(SHAPES) - len(ROWS) if small else place


def way(kind: str, rows: int, ways: tuple[str, ...] = (), weights: int | None = None) -> str:
    """How a product of `kind` (a key of `Table.seconds`) with so many rows is computed here.

    Args:
        kind: a key of `Table.seconds`.
        rows: of activations.
        ways: those that are possible for the weight at hand; none = all.
        weights: of the layer; None = many.
    """
    threads, forced = torch.get_num_threads(), os.environ.get(_FORCED, "")
    place = place_of(rows, weights)
    key = (threads, forced, kind, place, ways)
    found = _CHOSEN.get(key)
    if found is None:
        known = table()
        left = [name for name in known.seconds[kind] if not ways or name in ways]
        found = _CHOSEN[key] = known.best(kind, place, left)
    return found


def reference_forced() -> bool:
    """Whether `QSEARCH_PRODUCTS=reference` asks for the plain twins."""
    return os.environ.get(_FORCED) == "reference"


def table() -> Table:
    """The table of this core: of this process, else from disk, else timed now and kept there.

    Raises:
        ValueError: `QSEARCH_PRODUCTS` names no product, or one that is not exact on this core.
    """
    key = (torch.get_num_threads(), os.environ.get(_FORCED, ""))
    with _LOCK:
        if key not in _TABLES:
            full = load()
            if full is None:
                full = importlib.import_module(f"{__package__}.product_timing").timed()
                keep(full)
            _TABLES[key] = _restricted(full, key[1])
        return _TABLES[key]


def forget() -> None:
    """Drop what this process knows: the next question reads the disk or times again."""
    with _LOCK:
        _TABLES.clear()
        _CHOSEN.clear()


@contextlib.contextmanager
def using(given: Table) -> Iterator[None]:
    """Within it this table answers: for timing, and for tests of what another core would do."""
    with _LOCK:
        before = dict(_TABLES)
        key = (torch.get_num_threads(), os.environ.get(_FORCED, ""))
        _CHOSEN.clear()
        _TABLES[key] = given
        try:
            yield
        finally:
            _TABLES.clear()
            _TABLES.update(before)
            _CHOSEN.clear()


def float_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which this CPU multiplies floating-point inputs of `dtype` fastest.

    fp32 for 16-bit inputs on a core that has no units for them; nothing is ever made narrower.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return dtype if way(f"keep {name}", ROWS[-1]) == name else torch.float32


def fused_int_mm() -> bool:
    """Whether a compiler may write `torch._int_mm` into its graph: it is exact and fastest here."""
    if reference_forced() or not table().unsigned or table().exact["int_mm"] != "all":
        return False
    return way("wide", ROWS[-1]) == "int_mm"


for _function in (float_type, fused_int_mm):
    # what `torch.compiler.assume_constant_result` sets, without importing the compiler
    _function.__dict__["_dynamo_marked_constant"] = True


def kind_of(weight: Weight, activation: int | None) -> str:
    """The scheme of `SCHEMES` whose products a packed weight has; `activation`: bits, or None."""
    byte = weight.levels is None and weight.bits == 8 and weight.group <= 0
    if activation is None:
        return (
            "W8" if byte else "W4" if weight.group <= 0 and weight.levels is None else "W4 groups"
        )
    if byte and not integer_sums.fits_pairs(2**activation - 1, 128):
        return "W8A8"
    return "W8A7" if byte else "W4A8"


def describe() -> list[dict[str, Any]]:
    """A row for each scheme, type of input and range of rows: what serves it here and its worth.

    Returns:
        Rows with "scheme", "inputs", "rows", "product", "ms", and how many times as fast it is as
        full precision in fp32 and in bf16 ("x fp32", "x bf16"; below 1 is slower), of the
        large ones of `SHAPES`.
    """
    found, rows = table(), []
    for scheme in SCHEMES:
        for inputs in ("fp32", "bf16"):
            kind = f"{scheme} {inputs}"
            for place, count in enumerate(ROWS):
                chosen = found.best(kind, place)
                taken = found.seconds[kind][chosen][place]
                product = way("wide" if scheme == "W8A8" else "narrow", count)
                row: dict[str, Any] = {"scheme": scheme, "inputs": inputs, "rows": count}
                row |= {"product": product if "A" in scheme else chosen, "ms": taken * 1e3}
                for name in ("fp32", "bf16"):
                    row[f"x {name}"] = _keep(found, name, place) / taken
                rows.append(row)
    return rows


def worth(kind: str, rows: int, dtype: torch.dtype, weights: int | None = None) -> float:
    """How many times as fast as full precision a scheme of `SCHEMES` is here; below 1 is slower.

    Full precision is the faster of the layer in `dtype` and in fp32. `weights`: of the layer; None
    = many.
    """
    found, place = table(), place_of(rows, weights)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    times = found.seconds[f"{kind} {name}"]
    keep = min(_keep(found, each, place) for each in ("fp32", name))
    return keep / min(each[place] for each in times.values())


def _restricted(full: Table, forced: str) -> Table:
    """The table with one integer product alone where `QSEARCH_PRODUCTS` names it."""
    if forced in ("", "reference"):
        return full
    exact = [name for name in integer_sums.PRODUCTS if full.exact.get(name)]
    if forced not in exact:
        raise ValueError(
            f"{_FORCED} is one of reference, {', '.join(exact)} on this core; given {forced!r}"
        )
    seconds = dict(full.seconds)
    for kind in ("wide", "narrow"):
        left = {way: t for way, t in seconds[kind].items() if way.partition(" ")[0] == forced}
        seconds[kind] = left or seconds[kind]
    return full._replace(seconds=seconds)


def _keep(found: Table, name: str, place: int) -> float:
    return found.seconds[f"keep {name}"][name][place]


def fast_float(x: Tensor) -> Tensor:
    """`x` in the type in which its device multiplies it fastest: 16 bits become fp32 on a CPU that
    has no units for them.
    """
    return x.to(float_type(x.dtype)) if x.device.type == "cpu" else x


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of a weight in full precision, in the type of `x`, computed in
    the type that is fastest here.
    """
    wide = fast_float(x)
    if wide is x:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(
        wide, weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype)
    ).to(x.dtype)
