"""Draws the sketches of `graph_view.py`: a block's operations from top to bottom, a whole model as
rows that fold into a U where skips ask for it.

A box may carry a strip of coloured cells, one for each block that it stands for (`graph_heat.py`).

Everything is placed in pixels and nothing is scaled afterwards, so that text is as large in a
picture of ten boxes as in one of a hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from ..core.artifacts import write_atomic
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from .graph_boxes import INSET, box_size, draw_box, draw_curve, draw_frame, empty_canvas
from .graph_view import block_sketch, model_sketch
from .layered import layered
from .sketch import Group, Sketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Point = tuple[float, float]
    #: box -> colours of its cells (None = no number: hatched)
    Strips = Mapping[str, Sequence[str | None]]

_ROW, _COLUMN, _GAP = 30.0, 110.0, 24.0  # between rows, between legs, between boxes of a row
_FOLD, _LONG, _ROUNDS = (
    3,
    18,
    5,
    # skips that make a U; rows that ask for a second column; rounds that put the rows of a U beside
    # each other
)
_MARKS = ("#6a3d9a", "#1f78b4", "#33a02c", "#b15928", "#e31a1c", "#a6761d")


def draw(sketch: Sketch, strips: Strips | None = None) -> Figure:
    """The figure of a sketch, as large as it needs to be. `strips`: box -> colours of the cells at
    its lower edge; boxes themselves are then white.
    """
    return _draw_model(sketch, strips) if sketch.groups else _draw_block(sketch, strips)


def save_picture(graph: OpGraph, path: Path, block: str | None = None) -> None:
    """Write a picture of a block, or of the whole model, as SVG or PNG (the ending says which)."""
    write(draw(model_sketch(graph) if block is None else block_sketch(graph, block)), path)


def write(figure: Figure, path: Path) -> None:
    """Save as SVG (text stays text) or PNG, by the ending; the same figure gives the same bytes."""
    import matplotlib

    form = path.suffix.removeprefix(".").lower()
    if form not in ("svg", "png"):
        raise QSearchError(f"a picture is .svg or .png; given {path.name}")
    dated: dict[str, Any] = (
        {"metadata": dict.fromkeys(("Creator", "Date", "Format", "Type"))}
        if form == "svg"
        else {"dpi": 2 * figure.dpi}
    )
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": path.stem, "text.parse_math": False}
    ):
        write_atomic(path, lambda temporary: figure.savefig(temporary, format=form, **dated))


def _draw_block(sketch: Sketch, strips: Strips | None) -> Figure:
    graph = nx.DiGraph()
    graph.add_nodes_from(name for name in sketch.boxes if name not in sketch.conditions)
    graph.add_edges_from(sketch.edges)
    sizes = {
        name: box_size(box, strips is not None and name in strips)
        for name, box in sketch.boxes.items()
    }
    laid = layered(graph, sizes)
    top = _conditions_height(sketch, sizes)
    shelf, right = _shelf(sketch, sizes, top)
    figure, ax = empty_canvas(max(laid.width, right), laid.height + top, sketch.title)
    colours = _colours(sketch)
    for points in laid.routes.values():
        bent = [(points[0][0], points[0][1] + top)]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            bent += [(x0, (y0 + y1) / 2 + top), (x1, (y0 + y1) / 2 + top), (x1, y1 + top)]
        draw_curve(ax, bent)
    for name, box in sketch.boxes.items():
        x, y = shelf.get(name) or (laid.places[name][0], laid.places[name][1] + top)
        draw_box(
            ax, box, (x, y), sizes[name], colours, None if strips is None else strips.get(name, ())
        )
    return figure


def _draw_model(sketch: Sketch, strips: Strips | None) -> Figure:
    sizes = {
        name: box_size(box, strips is not None and name in strips)
        for name, box in sketch.boxes.items()
    }
    rows = _rows(sketch, sizes)
    row_of = {name: i for i, row in enumerate(rows) for group in row for name in group.boxes}
    skips = [
        (row_of[a], row_of[b])
        for a, b in sketch.edges
        if a in row_of and b in row_of and row_of[b] - row_of[a] > 1
    ]
    widths = [
        sum(_extent(group, sizes)[0] for group in row) + _GAP * (len(row) - 1) for row in rows
    ]
    heights = [max(_extent(group, sizes)[1] for group in row) for row in rows]
    top = _conditions_height(sketch, sizes)
    middles, legs = _middles(widths, heights, skips, top)
    shelf, right = _shelf(sketch, sizes, top)
    right = max([right, *(x + w / 2 for (x, _), w in zip(middles, widths, strict=True))])
    figure, ax = empty_canvas(
        right, max(y + h / 2 for (_, y), h in zip(middles, heights, strict=True)), sketch.title
    )
    places = dict(shelf)
    for row, (x, y), width in zip(rows, middles, widths, strict=True):
        left = x - width / 2
        for group in row:
            wide, high = _extent(group, sizes)
            if group.times > 1:
                draw_frame(ax, (left, y - high / 2), (wide, high), group.times)
            at = left + (INSET if group.times > 1 else 0)
            for name in group.boxes:
                places[name] = (at + sizes[name][0] / 2, y)
                at += sizes[name][0] + _GAP
            left += wide + _GAP
    for a, b in sketch.edges:
        near = row_of.get(a, -1) == row_of.get(b, -1)  # in a row, or both above the rest
        around = (
            near
            and places[b][0] - places[a][0]
            > (sizes[a][0] + sizes[b][0]) / 2 + 2 * _GAP + INSET + 46
        )  # a box stands between
        draw_curve(
            ax,
            _between(
                places[a],
                places[b],
                sizes[a],
                sizes[b],
                "under" if around else _way(a, b, row_of, legs),
            ),
        )
    for name, box in sketch.boxes.items():
        draw_box(
            ax,
            box,
            places[name],
            sizes[name],
            _colours(sketch),
            None if strips is None else strips.get(name, ()),
        )
    return figure


def _rows(sketch: Sketch, sizes: Mapping[str, Point]) -> list[list[Group]]:
    """Groups that stand side by side: a pattern that repeats has the single projections around it
    in its row.
    """
    rows: list[list[Group]] = []
    for group in sketch.groups:
        projection = group.times == 1 and sketch.boxes[group.boxes[0]].title == "projection"
        last = rows[-1] if rows else []
        if last and last[-1].times > 1 and projection and len(last) == 2:
            last.append(group)  # behind the pattern
        elif (
            last
            and group.times > 1
            and len(last) == 1
            and last[0].times == 1
            and sketch.boxes[last[0].boxes[0]].title == "projection"
        ):
            last.append(group)  # the pattern behind a projection
        else:
            rows.append([group])
    return rows


def _extent(group: Group, sizes: Mapping[str, Point]) -> Point:
    framed = group.times > 1
    wide = (
        sum(sizes[n][0] for n in group.boxes)
        + _GAP * (len(group.boxes) - 1)
        + (2 * INSET + 34 if framed else 0)
    )
    return wide, max(sizes[n][1] for n in group.boxes) + (16 if framed else 0)


def _middles(
    widths: list[float], heights: list[float], skips: list[tuple[int, int]], top: float
) -> tuple[list[Point], list[int]]:
    """The middle of each row, and which leg it stands in: one column, or columns of `_LONG` rows,
    or a U whose second leg rises.

    In a U a row stands beside the row that skips to it, where its neighbours leave room.
    """
    count = len(widths)
    folded = len(skips) >= _FOLD
    fold = min(target for _, target in skips) if folded else count
    legs = [
        int(i >= fold) if folded else i // -(-count // -(-count // _LONG)) for i in range(count)
    ]
    across, left = [], 0.0
    for leg in range(max(legs) + 1):
        width = max(w for w, at in zip(widths, legs, strict=True) if at == leg)
        across.append(left + width / 2)
        left += width + _COLUMN
    steps = [
        (a + b) / 2 + _ROW for a, b in itertools.pairwise(heights)
    ]  # from each row to the next
    down = {0: 0.0} if not folded else {fold - 1: 0.0}
    for i in range(1, 0 if folded else count):
        down[i] = down[i - 1] + steps[i - 1] if legs[i] == legs[i - 1] else 0.0
    for _ in range(
        _ROUNDS if folded else 0
    ):  # both legs rise from the fold, and a row rises to the one it is joined with
        for at in (*range(fold - 2, -1, -1), *range(fold, count)):
            joined = [
                down[other]
                for pair in skips
                if at in pair
                for other in pair
                if other != at and other in down
            ]
            base = (
                down[at + 1] - steps[at]
                if at < fold
                else down[at - 1] - steps[at - 1]
                if at > fold
                else down[fold - 1]
            )
            down[at] = min(base, max(joined)) if joined else base
    placed = [down[i] for i in range(count)]
    over = top - min(y - h / 2 for y, h in zip(placed, heights, strict=True))
    return [(across[leg], y + over) for leg, y in zip(legs, placed, strict=True)], legs


def _way(a: str, b: str, row_of: Mapping[str, int], legs: list[int]) -> str:
    """How a line goes: along a row, across legs, straight on in a column, or around the rows
    between.
    """
    if (
        a not in row_of
        or b not in row_of
        or row_of[a] == row_of[b]
        or legs[row_of[a]] != legs[row_of[b]]
    ):
        return "sideways"
    return "straight" if abs(row_of[a] - row_of[b]) == 1 else "around"


def _between(a: Point, b: Point, of_a: Point, of_b: Point, way: str) -> list[Point]:
    """Points of cubic curves from box to box: one start, then three for each curve."""
    (ax, ay), (bx, by) = a, b
    if way == "straight":
        rise = 1 if by > ay else -1
        y0, y1 = ay + rise * of_a[1] / 2, by - rise * of_b[1] / 2
        return [(ax, y0), (ax, (y0 + y1) / 2), (bx, (y0 + y1) / 2), (bx, y1)]
    if way == "under":
        y0, y1 = ay + of_a[1] / 2, by + of_b[1] / 2
        return [(ax, y0), (ax, max(y0, y1) + 22), (bx, max(y0, y1) + 22), (bx, y1)]
    if way == "around":
        away = min(ax - of_a[0] / 2, bx - of_b[0] / 2) - 40
        return [(ax - of_a[0] / 2, ay), (away, ay), (away, by), (bx - of_b[0] / 2, by)]
    x0, x1 = (
        (ax + of_a[0] / 2, bx - of_b[0] / 2) if bx > ax else (ax - of_a[0] / 2, bx + of_b[0] / 2)
    )
    return [(x0, ay), ((x0 + x1) / 2, ay), ((x0 + x1) / 2, by), (x1, by)]


def _colours(sketch: Sketch) -> dict[str, str]:
    """Title of a condition -> colour of its mark."""
    return {
        sketch.boxes[name].title: _MARKS[i % len(_MARKS)]
        for i, name in enumerate(sketch.conditions)
    }


def _shelf(
    sketch: Sketch, sizes: Mapping[str, Point], top: float
) -> tuple[dict[str, Point], float]:
    """Conditions side by side above the rest, and how far they reach."""
    places, left = {}, 0.0
    for name in sketch.conditions:
        places[name] = (left + sizes[name][0] / 2, (top - _ROW) / 2)
        left += sizes[name][0] + 24
    return places, left


def _conditions_height(sketch: Sketch, sizes: Mapping[str, Point]) -> float:
    return max((sizes[n][1] + _ROW for n in sketch.conditions), default=0.0)
