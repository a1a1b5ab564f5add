"""The block graph coloured by sensitivity: under each box a cell for every block that it stands
for, in order of execution.

What repeats is drawn once, and its repetitions are seldom alike: a strip of cells keeps the picture
small and hides none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .graph_picture import draw
from .graph_view import block_sketch, model_sketch
from .plots import colour_levels, decibels, losses
from .sketch import Sketch
from .style import FAINT, PAPER, QUIET, colour_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class GraphHeat:
    """A sketch, and for its boxes the decibels of each member: NaN = at the measurement floor.
    `levels`: the colour scale's steps.
    """

    sketch: Sketch
    cells: Mapping[str, tuple[float, ...]]
    levels: tuple[float, ...]
    title: str


def graph_heat(
    graph: OpGraph,
    table: SensitivityTable,
    scheme: Scheme | str,
    block: str | None = None,
    *,
    metric: str = "noise",
) -> GraphHeat:
    """The whole model with the noise of each block's layers added up, or one `block` with that of
    each layer, all at one scheme.
    """
    table.check(graph)
    known = losses(table, scheme, metric=metric)
    sketch = model_sketch(graph) if block is None else block_sketch(graph, block)
    layers = {b.name: b.layers for b in graph.blocks} | {
        layer.name: (layer.name,) for layer in graph
    }
    cells = {}
    for box, members in sketch.members.items():
        held = [[known[name] for name in layers[member] if name in known] for member in members]
        if any(held):
            cells[box] = tuple(
                _decibels(sum(x.estimate for x in of), sum(x.floor for x in of)) for of in held
            )
    return GraphHeat(
        sketch,
        cells,
        colour_levels(x for row in cells.values() for x in row),
        f"SQNR of the output at {scheme}, dB: less is more sensitive",
    )


def _decibels(noise: float, floor: float) -> float:
    return math.nan if noise < 2 * floor else decibels(noise)


def draw_graph_heat(data: GraphHeat) -> Figure:
    """The picture of the graph with its cells, and the colours' key below."""
    from matplotlib.patches import Rectangle

    colour, steps = colour_steps(data.levels)
    strips = {
        box: [None if math.isnan(x) else colour(x) for x in row] for box, row in data.cells.items()
    }
    figure = draw(data.sketch, strips)
    [ax] = figure.axes
    bottom, top = ax.get_ylim()
    place, size = bottom + 4, 26.0
    for i, (low, shade) in enumerate(zip(data.levels, steps, strict=False)):
        ax.add_patch(Rectangle((i * size, place), size, 11, fc=shade, ec=PAPER, lw=0.6))
        ax.text(i * size, place + 14, f"{low:g}", fontsize=6.8, color=QUIET, ha="center", va="top")
    end = len(steps) * size
    ax.text(
        end, place + 14, f"{data.levels[-1]:g}", fontsize=6.8, color=QUIET, ha="center", va="top"
    )
    ax.text(0, place - 3, data.title, fontsize=7.5, color=QUIET, ha="left", va="bottom")
    if any(math.isnan(x) for row in data.cells.values() for x in row):
        ax.add_patch(
            Rectangle((end + 24, place), size, 11, fc=FAINT, ec=PAPER, lw=0.6, hatch="/////")
        )
        ax.text(
            end + 28 + size,
            place + 5.5,
            "at the measurement floor",
            fontsize=6.8,
            color=QUIET,
            ha="left",
            va="center",
        )
    extra = 36.0
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + extra / 96)
    ax.set_ylim(bottom + extra, top)
    return figure
