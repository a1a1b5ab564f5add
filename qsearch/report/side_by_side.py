"""Models of different build beside each other, a DiT and a U-Net for instance: which kinds of layer
make the noise, and how sensitive each layer is.

Families of roles are what such models share. On the left every layer, on the right the share of a
uniform plan's noise that a family makes, beside its share of the weights: a family whose bar
reaches past its mark is more sensitive than it is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .boxes import SERIES, Boxes, boxes_into, legend, place, role_boxes
from .plots import family, losses
from .style import HALF, INK, WIDE, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Share:
    """Of one family in one model: its share of the noise of the uniform plan, the share's standard
    error, and its share of the weights (0 to 1).
    """

    noise: float
    error: float
    weights: float


@dataclass(frozen=True)
class SideBySide:
    """`shares`[family][model] in the order of the boxes' rows."""

    boxes: Boxes
    shares: tuple[tuple[Share, ...], ...]
    scheme: str


def side_by_side(
    models: Mapping[str, tuple[OpGraph, SensitivityTable]],
    scheme: Scheme | str,
    *,
    metric: str = "noise",
) -> SideBySide:
    """What the families of each model contribute at one scheme; noise powers add up, so shares do
    as well.
    """
    boxes = role_boxes(models, scheme, metric=metric, families=True)
    columns = [_shares(graph, table, scheme, metric) for graph, table in models.values()]
    empty = Share(0.0, 0.0, 0.0)
    return SideBySide(
        boxes,
        tuple(tuple(column.get(name, empty) for column in columns) for name in boxes.roles),
        str(scheme),
    )


def _shares(
    graph: OpGraph, table: SensitivityTable, scheme: Scheme | str, metric: str
) -> dict[str, Share]:
    known = losses(table, scheme, metric=metric)
    measured = [layer for layer in graph.quantizable if layer.name in known]
    weights = sum(layer.weights for layer in measured)
    total = (
        math.fsum(known[layer.name].estimate for layer in measured) or 1.0
    )  # nothing makes noise: all shares are 0
    variance = math.fsum(known[layer.name].error ** 2 for layer in measured)
    found = {}
    for name in dict.fromkeys(family(layer.role) for layer in measured):
        held = [layer for layer in measured if family(layer.role) == name]
        part, own = (
            math.fsum(known[x.name].estimate for x in held),
            math.fsum(known[x.name].error ** 2 for x in held),
        )
        share = part / total
        # A ratio of sums that share `part`: its own error counts with (1 - share), the others' with
        # share.
        error = math.sqrt((1 - share) ** 2 * own + share**2 * (variance - own)) / total
        found[name] = Share(share, error, sum(x.weights for x in held) / weights)
    return found


def draw_side_by_side(data: SideBySide, width: int = WIDE) -> Figure:
    """Boxes and shares beside each other, above each other on a narrow page."""
    return styled(lambda: _draw(data, width))


def _draw(data: SideBySide, width: int) -> Figure:
    from matplotlib.lines import Line2D

    wide = width >= HALF
    rows, models = len(data.boxes.roles), len(data.boxes.models)
    height = 30 + rows * (10 + 16 * models)
    figure, first = canvas(width, height + 60 if wide else 2 * height + 110)
    first.remove()
    left, right = (
        figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if wide else figure.subplots(2, 1)
    )
    boxes_into(left, data.boxes)
    _bars(right, data, models)
    if not wide:
        right.set_yticks(range(rows), data.boxes.roles)
        right.set_ylim(rows - 0.5, -0.5)
    handles, words = legend(data.boxes)
    handles.append(
        Line2D([], [], color=INK, marker="|", markersize=9, markeredgewidth=1.6, linestyle="none")
    )
    figure.legend(
        handles,
        [*words, "share of the weights"],
        loc="outside upper left",
        ncols=len(handles) if wide else 2,
        borderpad=0,
        columnspacing=1.4,
    )
    return figure


def _bars(ax: Axes, data: SideBySide, models: int) -> None:
    for row, held in enumerate(data.shares):
        for i, share in enumerate(held):
            if share.weights == 0:
                continue  # this model has none of the family
            y = row + place(i, models)
            ax.barh(y, 100 * share.noise, 0.62 / models, color=SERIES[i % len(SERIES)])
            if math.isfinite(share.error):  # of one sample there is none
                ax.errorbar(
                    100 * share.noise,
                    y,
                    xerr=100 * share.error,
                    fmt="none",
                    ecolor=INK,
                    capsize=2,
                    elinewidth=1,
                )
            ax.plot([100 * share.weights], [y], "|", color=INK, markersize=9, markeredgewidth=1.6)
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"share of the noise of uniform {data.scheme}, %")
    ax.grid(axis="x", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
