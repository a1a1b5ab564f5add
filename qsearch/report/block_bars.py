"""How much noise each block makes when all of its layers get one scheme: bars in order of
execution, with error bars and the floor.

Bars stand on a logarithmic axis, since blocks differ by decades; what they say is a power, and
powers of independent choices add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import QSearchError
from ..core.graph import Block, LayerSpec, OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .graph_view import kind_colour
from .plots import FAMILIES, LayerAxis, layer_axis, losses
from .style import FAMILY_COLOURS, HALF, INK, QUIET, WIDE, layer_figure, power_of_ten, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# of the output's power: below it no arithmetic measures anything, and a logarithm has no zero
_LEAST = 1e-15


@dataclass(frozen=True)
class BlockBars:
    """Noise power of each block over the output's power (1 = as loud as the output), its standard
    error, and whether it lies at the floor.

    `families`: what the block is coloured by.
    """

    axis: LayerAxis
    noise: tuple[float, ...]
    errors: tuple[float, ...]
    at_floor: tuple[bool, ...]
    families: tuple[str, ...]
    scheme: str


def block_bars(
    graph: OpGraph, table: SensitivityTable, scheme: Scheme | str, *, metric: str = "noise"
) -> BlockBars:
    """The sum over each block's measured layers at one scheme. Raises `QSearchError` for a graph
    without blocks.
    """
    table.check(graph)
    if not graph.blocks:
        raise QSearchError(
            f"the graph of {graph.model} holds no blocks, only layers; make it again with "
            "`qsearch extract`"
        )
    known = losses(table, scheme, metric=metric)
    blocks = [
        b
        for b in sorted(graph.blocks, key=lambda b: b.position)
        if any(name in known for name in b.layers)
    ]
    if not blocks:
        raise QSearchError(
            f"the table has no layer of a block of {graph.model} at {scheme}; profile more of them"
        )
    held = [[known[name] for name in b.layers if name in known] for b in blocks]
    noise = tuple(math.fsum(x.estimate for x in of) for of in held)
    errors = tuple(math.sqrt(math.fsum(x.error**2 for x in of)) for of in held)
    floors = [math.fsum(x.floor for x in of) for of in held]
    low = tuple(value < 2 * floor for value, floor in zip(noise, floors, strict=True))
    families = tuple(
        kind if (kind := kind_colour(b.kind)) in FAMILIES else "linear" for b in blocks
    )
    return BlockBars(_axis(graph, blocks), noise, errors, low, families, str(scheme))


def _axis(graph: OpGraph, blocks: list[Block]) -> LayerAxis:
    """Blocks as an axis, named by their kind, with the repeated modules that hold them as spans."""
    home = {layer.name: layer.block for layer in graph}
    made = [LayerSpec(b.name, "block", b.kind, (1,), 0, home[b.layers[0]]) for b in blocks]
    axis = layer_axis(made)
    return LayerAxis(axis.names, tuple(b.kind for b in blocks), axis.spans, axis.key)


def draw_block_bars(data: BlockBars, width: int = WIDE) -> Figure:
    """A bar a block with one standard error each way; hollow and hatched where the number is the
    measurement's own noise.
    """
    return styled(lambda: _draw(data, width))


def _draw(data: BlockBars, width: int) -> Figure:
    from matplotlib.patches import Patch

    wide, n = width >= HALF, len(data.noise)
    figure, ax, _ = layer_figure(
        data.axis, width, across=180 if wide else 240, title="blocks in order of execution"
    )
    percent = [100 * max(x, _LEAST) for x in data.noise]
    known = [
        e if math.isfinite(e) else math.nan for e in data.errors
    ]  # of one sample there is none
    errors = (
        [min(100 * e, 0.999 * x) for e, x in zip(known, percent, strict=True)],
        [100 * e for e in known],
    )
    bars = ax.bar(range(n), percent, 0.78) if wide else ax.barh(range(n), percent, 0.78)
    for bar, name, low in zip(bars, data.families, data.at_floor, strict=True):
        colour = FAMILY_COLOURS[name]
        bar.set(
            facecolor="none" if low else colour,
            edgecolor=colour,
            hatch="/////" if low else None,
            linewidth=0.8,
        )
    if wide:
        ax.errorbar(
            range(n), percent, yerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5
        )
    else:
        ax.errorbar(
            percent, range(n), xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5
        )
    (ax.set_yscale if wide else ax.set_xscale)("log")
    ends = [
        10.0 ** math.floor(math.log10(0.7 * min(percent))),
        10.0 ** math.ceil(math.log10(1.3 * max(percent))),
    ]
    (ax.set_ylim if wide else ax.set_xlim)(*ends)
    (ax.set_ylabel if wide else ax.set_xlabel)(f"noise at {data.scheme}, % of output power")
    (ax.yaxis if wide else ax.xaxis).set_major_formatter(
        lambda value, _: power_of_ten(round(math.log10(value)))
    )
    (ax.yaxis if wide else ax.xaxis).set_minor_formatter(lambda value, _: "")
    ax.grid(axis="y" if wide else "x", linewidth=0.6)
    ax.set_axisbelow(True)
    handles = [Patch(color=FAMILY_COLOURS[name]) for name in FAMILIES if name in data.families]
    words = [name for name in FAMILIES if name in data.families]
    if any(data.at_floor):
        handles.append(Patch(facecolor="none", edgecolor=QUIET, hatch="/////"))
        words.append("at the measurement floor")
    figure.legend(
        handles,
        words,
        loc="outside upper left",
        ncols=len(words) if wide else 2,
        handlelength=1.4,
        columnspacing=1.4,
        borderpad=0,
    )
    return figure
