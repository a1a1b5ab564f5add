"""Schemes of packed layers that this CPU computes slower than full precision, found before a run.

A plan is made on one machine and run on another: what an int8 GEMM gains on a core with VNNI, a
core without it may lose. The kernels' table of products (`qsearch_kernels.products`) knows both
times for this core, so that `apply` can name the schemes at fault once, instead of being slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from qsearch_kernels import products

from .layers import QuantLayer
from .packing import PackedWeight

ROWS = 256  # tokens of one call, where the layer does not say


class SlowerWarning(UserWarning):
    """Packed layers take longer on this CPU than the layers that they replace."""


def slower_schemes(
    layers: Iterable[tuple[str, QuantLayer]], dtype: torch.dtype = torch.float32, rows: int = ROWS
) -> dict[str, float]:
    """Schemes whose layers this CPU computes slower than full precision.

    Args:
        layers: (name, packed layer), as `packed_layers(model).items()` gives them.
        dtype: of the layers' inputs.
        rows: of one call.

    Returns:
        Scheme -> time as a multiple of full precision's, where that is more than 1.1.
    """
    given = []
    for _, layer in layers:
        rounded = layer.input is not None and "cpu" in layer.devices
        bits = layer.input.bits if rounded and layer.input is not None else None
        for part in layer.weights:
            if isinstance(part, PackedWeight):
                given.append((str(layer.scheme), part.weight(), bits, rows))
    return products.slower_than_keep(given, dtype)


def warn_of_slower(
    layers: Iterable[tuple[str, QuantLayer]], dtype: torch.dtype = torch.float32, rows: int = ROWS
) -> None:
    """One `SlowerWarning` that names the schemes of `slower_schemes` and what does better here."""
    found = slower_schemes(layers, dtype, rows)
    if not found:
        return
    text = ", ".join(f"{scheme} ({times:.1f} times)" for scheme, times in sorted(found.items()))
    warnings.warn(
        f"this CPU computes these schemes slower than full precision: {text}. Memory is the plan's;"
        " for speed measure this machine with `qsearch bench RUN --output latency.json` and plan"
        " with `qsearch allocate RUN --device latency.json`",
        SlowerWarning,
        stacklevel=3,
    )
