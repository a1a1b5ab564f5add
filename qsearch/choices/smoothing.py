"""Smoothing by search: of SVDQuant's grid of exponents, the scales with the least output error.

Each input channel is divided by s_c = span(x_c)^alpha / span(w_c)^beta, its weights are multiplied
by it; span is the largest magnitude. SVDQuant tries 39 pairs (deepcompressor, calib/smooth.py):
none, alpha = i/20 with beta = 0, and alpha = i/20 with beta = 1 - alpha (SmoothQuant's), and keeps
the one whose quantized layer is nearest to the layer on recorded inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import QSearchError

GRID = 20
_SMALLEST = 1e-5  # of a span: a channel that is never used must not be blown up


@dataclass(frozen=True)
class Smoothed:
    """`scale`: fp32 [columns], by which inputs are divided and weights multiplied; how it was made.

    `error`: squared output error over the output's own power.
    """

    scale: Tensor
    alpha: float
    beta: float
    error: float


def pairs(grid: int = GRID) -> list[tuple[float, float]]:
    """The exponents that are tried: 2 * grid - 1 of them."""
    inner = [i / grid for i in range(1, grid)]
    return [(0.0, 0.0), *((a, 0.0) for a in inner), *((a, 1 - a) for a in inner)]


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float, beta: float) -> Tensor:
    """s [columns] of spans [columns], scaled to have a geometric mean of 1."""
    x, w = inputs.clamp(min=_SMALLEST), weights.clamp(min=_SMALLEST)
    scale = x.pow(alpha) / w.pow(beta)
    return scale / scale.log().mean().exp()


def smoothed(
    weight: Tensor,
    rows: Tensor,
    simulate: Callable[[Tensor, Tensor], Tensor],
    grid: int = GRID,
    layer: str = "the layer",
) -> Smoothed:
    """The scales of `pairs(grid)` with which a quantized layer is nearest to the layer on `rows`.

    Args:
        weight: fp32 [outputs, columns].
        rows: fp32 [n, columns], inputs that were recorded.
        simulate: (weight times s, rows over s) -> outputs [n, outputs] of the layer as quantized,
            its low-rank branch and the rounding of its inputs included.
        grid: steps of alpha.
        layer: its name in errors.

    Raises:
        QSearchError: where no row was recorded, or rows are not finite.
    """
    if not len(rows) or not bool(torch.isfinite(rows).all()):
        raise QSearchError(f"smoothing by search needs finite recorded inputs; {layer} has none")
    truth = rows @ weight.T
    power = float(truth.square().sum()) or 1.0
    inputs, weights = rows.abs().amax(0), weight.abs().amax(0)
    best: Smoothed | None = None
    for alpha, beta in pairs(grid):
        scale = smoothing_scale(inputs, weights, alpha, beta)
        made = simulate(weight * scale, rows / scale)
        error = float((made - truth).square().sum()) / power
        if best is None or error < best.error:
            best = Smoothed(scale, alpha, beta, error)
    assert best is not None
    return best
