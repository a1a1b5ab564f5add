"""Schemes of packed layers that this CPU computes slower than full precision, found before a run.

A plan is made on one machine and run on another: what an int8 GEMM gains on a core with VNNI, a
core without it may lose. The kernels' table of products (`qsearch_kernels.products`) knows both
times for this core, so that `apply` can name the schemes at fault once, instead of being slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qsearch_kernels import products
from qsearch_kernels.product_table import ROWS as TIMED

from ..choices.packed_weight import KernelWeight
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from .layers import QuantLayer

ROWS = 256  # tokens of one call, where the graph does not say
SLACK = 1.1  # times as long as full precision that are not worth a word


class SlowerWarning(UserWarning):
    """Packed layers take longer on this CPU than the layers that they replace."""


def check_products() -> None:
    """Make or read this CPU's table of products.

    Raises:
        QSearchError: `QSEARCH_PRODUCTS` names a product that does not exist or is not exact here.
    """
    try:
        products.table()
    except ValueError as error:
        raise QSearchError(str(error)) from None


def products_here() -> list[dict[str, Any]]:
    """What serves each scheme on this CPU, and its worth: a row a scheme and type of inputs.

    Returns:
        Rows with "scheme", "inputs" and, under each number of rows of activations, the product and
        how many times as fast as `keep` it is (`keep`: the faster of fp32 and the inputs' type).
    """
    check_products()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in products.describe():
        kind = (row["scheme"], row["inputs"])
        line = found.setdefault(kind, {"scheme": kind[0], "inputs": kind[1]})
        keep = row["x fp32"] if kind[1] == "fp32" else min(row["x fp32"], row["x bf16"])
        title = "1 row" if row["rows"] == TIMED[0] else f"{row['rows']} rows"
        line[title] = "reference" if products.reference_forced() else f"{row['product']} {keep:.2f}"
    return list(found.values())


def rows_of(graph: OpGraph) -> dict[str, int]:
    """Layer -> rows of activations that one call of it multiplies, by the graph's work."""
    return {x.name: max(1, round(x.macs / (max(1, x.weights) * max(1, x.calls)))) for x in graph}


@dataclass(frozen=True)
class Slower:
    """What a CPU makes of packed layers.

    Attributes:
        plan: seconds of all packed layers together, as a multiple of full precision's.
        schemes: scheme -> the same of its slowest layer, where that is more than `SLACK`.
    """

    plan: float
    schemes: dict[str, float]


def slower_than_keep(
    layers: Iterable[tuple[str, QuantLayer]],
    dtype: torch.dtype = torch.float32,
    rows: Mapping[str, int] | None = None,
) -> Slower:
    """How much slower than full precision this CPU computes packed layers.

    A layer's time is its multiply-accumulates divided by the worth of its product at so many rows
    (`products.worth`); layers that the plan keeps are left out.

    Args:
        layers: (name, packed layer), as `packed_layers(model).items()` gives them.
        dtype: of the layers' inputs.
        rows: layer -> rows of one call (`rows_of`); `ROWS` where it does not say.

    Returns:
        The plan's time and the schemes that are slower, nothing of either where
        `QSEARCH_PRODUCTS=reference` asks for slow products.

    Raises:
        QSearchError: as `check_products`.
    """
    check_products()
    known, schemes = rows or {}, dict[str, float]()
    packed = full = 0.0
    for name, layer in layers if not products.reference_forced() else ():
        rounded = layer.input is not None and "cpu" in layer.devices
        bits = layer.input.bits if rounded and layer.input is not None else None
        whole = name.rpartition(".layers.")[0]  # of one that differs between ranges of steps
        count = known.get(name, known.get(whole, ROWS))
        for part in layer.weights:
            if not isinstance(part, KernelWeight):
                continue
            weight = part()
            numbers = len(weight.codes) * weight.columns
            times = 1 / products.worth(products.kind_of(weight, bits), count, dtype, numbers)
            work = float(count * numbers)
            packed, full = packed + work * times, full + work
            if times > SLACK:
                scheme = str(layer.scheme)
                schemes[scheme] = max(times, schemes.get(scheme, 0.0))
    return Slower(packed / full if full else 1.0, schemes)


def warn_of_slower(
    layers: Iterable[tuple[str, QuantLayer]],
    dtype: torch.dtype = torch.float32,
    rows: Mapping[str, int] | None = None,
) -> None:
    """One `SlowerWarning` where the plan is slower than full precision, with the schemes at
    fault.
    """
    found = slower_than_keep(layers, dtype, rows)
    if found.plan <= SLACK:
        return
    listed = sorted(found.schemes.items())
    text = ", ".join(f"{scheme} ({times:.1f} times)" for scheme, times in listed)
    warnings.warn(
        f"on this CPU the plan takes about {found.plan:.1f} times as long as full precision, for "
        f"{text}. Memory is the plan's; for speed measure this machine with `qsearch bench RUN "
        "--output latency.json` and plan with `qsearch allocate RUN --device latency.json`",
        SlowerWarning,
        stacklevel=4,
    )
