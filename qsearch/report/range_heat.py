"""A plan over ranges of sampler steps as a heat map: layers by ranges, coloured by the bits of the
weight, of the input, or of both.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from .plots import LayerAxis, layer_axis
from .style import HALF, PAPER, WIDE, layer_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RangeBits:
    """`bits` [layers, ranges]: of what `title` says. `columns`: the ranges in words."""

    axis: LayerAxis
    columns: tuple[str, ...]
    bits: NDArray[np.float64]
    title: str


def range_bits(graph: OpGraph, plan: Plan) -> RangeBits:
    """Bits of what differs between the ranges: of inputs where only they do, of weights where only
    they do, else their product.

    Raises:
        QSearchError: the plan has one range.
    """
    count = len(plan.steps)
    if count == 1:
        raise QSearchError("a plan of one range is the same in all steps; there is nothing to draw")
    layers = graph.quantizable
    rows = [
        [held[i if len(held) > 1 else 0] for i in range(count)]
        for held in (plan.choices[layer.name] for layer in layers)
    ]
    weights: NDArray[np.float64] = np.array([[float(s.bits) for s in row] for row in rows])
    inputs: NDArray[np.float64] = np.array(
        [[float(s.activation_bits) for s in row] for row in rows]
    )
    moved = [bool((part != part[:, :1]).any()) for part in (weights, inputs)]
    names: dict[tuple[bool, bool], tuple[str, NDArray[np.float64]]] = {
        (True, False): ("bits of the weight", weights),
        (False, True): ("bits of the input", inputs),
        (False, False): ("bits of the input", inputs),
    }
    title, shown = names.get((moved[0], moved[1]), ("weight bits x input bits", weights * inputs))
    ends = [0.0, *plan.steps.bounds, 1.0]
    columns = tuple(f"{a:.0%} to {b:.0%}" for a, b in itertools.pairwise(ends))
    return RangeBits(layer_axis(layers), columns, shown, title)


def draw_range_bits(data: RangeBits, width: int = WIDE) -> Figure:
    """Layers along the width of a wide figure or down a narrow one, ranges of the sampler's steps
    across.
    """
    return styled(lambda: _draw(data, width))


def _draw(data: RangeBits, width: int) -> Figure:
    from matplotlib import colormaps

    wide = width >= HALF
    n, columns = data.bits.shape
    figure, ax, _ = layer_figure(data.axis, width, across=26 * columns + 16 if wide else 240)
    x, y = (n, columns) if wide else (columns, n)
    mesh = ax.pcolormesh(
        np.arange(x + 1) - 0.5,
        np.arange(y + 1) - 0.5,
        data.bits.T if wide else data.bits,
        cmap=colormaps["viridis"],
        edgecolors=PAPER,
        linewidth=0.4,
    )
    across: Any = ax.yaxis if wide else ax.xaxis
    across.set_ticks(range(columns), data.columns)
    across.set_label_text("of the sampler's steps")
    if wide:
        ax.set_ylim(columns - 0.5, -0.5)
    else:
        ax.set_xlim(-0.5, columns - 0.5)
        ax.tick_params(axis="x", labelrotation=30)
    bar = figure.colorbar(
        mesh,
        ax=ax,
        location="right" if wide else "bottom",
        pad=0.01,
        aspect=12 if wide else 30,
        fraction=0.02 if wide else 0.05,
    )
    bar.set_label(data.title)
    levels = np.unique(data.bits)
    if len(levels) <= 8:
        bar.set_ticks(list(levels))
    bar.outline.set_visible(False)
    return figure
