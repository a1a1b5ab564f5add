"""How sensitive the layers of each role are, for one model or for several beside each other: boxes,
and every layer as a point.

A box says where half of a role's layers lie; the points say how many there are, so that nobody
takes a box of three layers for a law. A layer at the measurement floor has no number but a bound:
it stands at least so far above its noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .plots import Loss, decibels, family, losses
from .style import HALF, INK, QUIET, canvas, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..core.attribution import Attribution

_FEWEST = 5  # layers that make a box
#: colours of models beside each other: far apart in hue and in lightness
SERIES = ("#0072b2", "#e69f00", "#4d4d4d", "#cc79a7")
MARKERS = ("o", "D", "s", "^")


@dataclass(frozen=True)
class Box:
    """Layers of one role in one model. `values`: decibels (or scores) of those above the floor,
    ascending; `bounds`: the least decibels of those at it.

    `summary`: whisker, quartile, median, quartile, whisker (the last layers within 1.5 times the
    box's length from it), None for fewer than five.
    """

    values: tuple[float, ...]
    bounds: tuple[float, ...]
    summary: tuple[float, float, float, float, float] | None


@dataclass(frozen=True)
class Boxes:
    """`boxes`[role][model], the role with the most sensitive median first. `title`: what the values
    are (of one layer alone).
    """

    roles: tuple[str, ...]
    models: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]
    title: str


def role_boxes(
    models: Mapping[str, tuple[OpGraph, SensitivityTable]],
    scheme: Scheme | str,
    *,
    metric: str = "noise",
    families: bool = False,
) -> Boxes:
    """Boxes of every role (or of the few `families` of roles, which models of different build
    share) at one scheme.
    """
    found: dict[str, dict[str, list[Loss]]] = {}
    for model, (graph, table) in models.items():
        table.check(graph)
        known = losses(table, scheme, metric=metric)
        for layer in graph.quantizable:
            if layer.name in known:
                found.setdefault(family(layer.role) if families else layer.role, {}).setdefault(
                    model, []
                ).append(known[layer.name])
    boxes = {
        role: tuple(_box(held.get(model, [])) for model in models) for role, held in found.items()
    }
    ordered = sorted(boxes, key=lambda role: (min(_middle(box) for box in boxes[role]), role))
    return Boxes(
        tuple(ordered),
        tuple(models),
        tuple(boxes[role] for role in ordered),
        f"{_name(metric)} at {scheme}, dB (← more sensitive)",
    )


def score_boxes(
    graph: OpGraph,
    attribution: Attribution,
    *,
    metric: str,
    method: str,
    schemes: Sequence[str] = (),
) -> Boxes:
    """Boxes of a graph predictor's scores of operations, by role, the schemes that were scored
    beside each other (the first four when none are given).
    """
    frame: Any = attribution.select(method=method, kind="operation", metric=metric)
    known = list(dict.fromkeys(frame["choice"]))
    for scheme in schemes:
        if scheme not in known:
            raise QSearchError(f"{method} has no scores at {scheme!r}{nearest(scheme, known)}")
    asked = tuple(schemes or known[: len(SERIES)])
    found: dict[str, dict[str, list[float]]] = {}
    for name, choice, value in frame[["name", "choice", "value"]].itertuples(index=False):
        if name in graph:
            found.setdefault(graph.layer(name).role, {}).setdefault(choice, []).append(float(value))
    boxes = {
        role: tuple(_summed(sorted(held.get(scheme, [])), ()) for scheme in asked)
        for role, held in found.items()
    }
    ordered = sorted(boxes, key=lambda role: (min(_middle(box) for box in boxes[role]), role))
    return Boxes(
        tuple(ordered),
        asked,
        tuple(boxes[role] for role in ordered),
        f"score of {method} for {metric} (← worse)",
    )


def _box(held: list[Loss]) -> Box:
    above = sorted(decibels(loss.estimate) for loss in held if not loss.at_floor)
    return _summed(above, tuple(sorted(decibels(2 * loss.floor) for loss in held if loss.at_floor)))


def _summed(above: list[float], bounds: tuple[float, ...]) -> Box:
    if len(above) < _FEWEST:
        return Box(tuple(above), bounds, None)
    low, middle, high = (float(q) for q in np.quantile(above, (0.25, 0.5, 0.75)))
    reach = 1.5 * (high - low)
    inside = [x for x in above if low - reach <= x <= high + reach]
    return Box(tuple(above), bounds, (inside[0], low, middle, high, inside[-1]))


def _middle(box: Box) -> float:
    held = (*box.values, *box.bounds)
    return float(np.median(held)) if held else np.inf


def _name(metric: str) -> str:
    return "SQNR" if metric == "noise" else f"{metric} kept"


def draw_role_boxes(data: Boxes, width: int = HALF) -> Figure:
    """A row a role, models above each other in it; a box where there are five layers or more, a
    point a layer, a triangle for one at the floor.
    """
    return styled(lambda: _draw(data, width))


def _draw(data: Boxes, width: int) -> Figure:
    figure, ax = canvas(width, 78 + len(data.roles) * (8 + 16 * len(data.models)))
    boxes_into(ax, data)
    if (keys := legend(data))[0]:
        figure.legend(
            *keys,
            loc="outside upper left",
            ncols=min(len(data.models), 2) + 1,
            borderpad=0,
            columnspacing=1.2,
            handletextpad=0.4,
        )
    return figure


def boxes_into(ax: Axes, data: Boxes) -> None:
    """The rows of boxes in axes that are given."""
    for row, held in enumerate(data.boxes):
        for i, box in enumerate(held):
            y, colour = row + place(i, len(held)), SERIES[i % len(SERIES)]
            if not box.values and not box.bounds:
                ax.text(
                    0.995,
                    y,
                    f"none in {data.models[i]}",
                    transform=ax.get_yaxis_transform(),
                    ha="right",
                    va="center",
                    color=QUIET,
                    fontsize=6.5,
                )
            if box.summary is not None:
                keys = ("whislo", "q1", "med", "q3", "whishi")
                style: dict[str, Any] = {"color": QUIET, "linewidth": 0.9}
                stats: dict[str, Any] = dict(zip(keys, box.summary, strict=True)) | {"fliers": []}
                wide = 0.62 / len(held)
                filled = {"facecolor": _pale(colour), "edgecolor": QUIET, "linewidth": 0.9}
                bold = {"color": INK, "linewidth": 1.8}
                ax.bxp(
                    [stats],
                    positions=[y],
                    widths=wide,
                    orientation="horizontal",
                    patch_artist=True,
                    showfliers=False,
                    manage_ticks=False,
                    boxprops=filled,
                    medianprops=bold,
                    whiskerprops=style,
                    capprops=style,
                )
            ax.plot(
                box.values,
                [y] * len(box.values),
                MARKERS[i % len(MARKERS)],
                color=colour,
                markersize=3.2,
                markeredgecolor="white",
                markeredgewidth=0.4,
            )
            ax.plot(
                box.bounds,
                [y] * len(box.bounds),
                ">",
                color="none",
                markeredgecolor=colour,
                markersize=4,
                markeredgewidth=0.8,
            )
    ax.set_yticks(range(len(data.roles)), data.roles)
    ax.set_ylim(len(data.roles) - 0.5, -0.5)
    ax.set_xlabel(data.title)
    ax.grid(axis="x", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)


def place(i: int, count: int) -> float:
    """Where the i-th of `count` models stands within a row."""
    return (i - (count - 1) / 2) * 0.8 / count


def legend(data: Boxes) -> tuple[list[Any], list[str]]:
    """Handles and words: the models where there are several, and the mark of the floor where a
    layer lies at it.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=SERIES[i % len(SERIES)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="none",
            markersize=5,
        )
        for i in range(len(data.models))
    ]
    words = list(data.models)
    if len(words) == 1:
        handles, words = [], []
    if any(box.bounds for held in data.boxes for box in held):
        handles.append(
            Line2D(
                [],
                [],
                color="none",
                marker=">",
                markeredgecolor=QUIET,
                linestyle="none",
                markersize=5,
            )
        )
        words.append("at the measurement floor: at least")
    return handles, words


def _pale(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.78 + 0.22 * c for c in to_rgb(colour))
