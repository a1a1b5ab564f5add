"""Boxes, frames and lines of the pictures of graphs, at their places in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .sketch import Box
from .style import FAINT, FAMILY_COLOURS, INK, PAPER, QUIET, RAISED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Point = tuple[float, float]

_LETTER, _LINE, _PAD = 6.1, 13.0, 9.0  # pixels: of a letter, of a line, around the text
_MARGIN, _HEAD = 22.0, 34.0
INSET = 10.0  # pixels within a frame
_STRIP = 15.0  # pixels: cells at the lower edge of a box
_TEXT, _SMALL = 8.0, 6.8  # points


def draw_frame(ax: Axes, corner: Point, size: Point, times: int) -> None:
    """A frame around a pattern that repeats, with its count."""
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(
        FancyBboxPatch(
            corner, *size, boxstyle="round,pad=0,rounding_size=8", fc=RAISED, ec=FAINT, lw=1
        )
    )
    ax.text(
        corner[0] + size[0] - INSET,
        corner[1] + 6,
        f"×{times}",
        ha="right",
        va="top",
        fontsize=_TEXT + 1.5,
        color=INK,
        weight="bold",
    )


def empty_canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A titled figure with room for that many pixels, y downwards, and its axes."""
    from matplotlib.figure import Figure

    wide, high = max(width, 7.6 * len(title)) + 2 * _MARGIN, height + _HEAD + 2 * _MARGIN
    figure = Figure(figsize=(wide / 96, high / 96), dpi=96, facecolor="white")
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set_xlim(-_MARGIN, wide - _MARGIN)
    ax.set_ylim(height + _MARGIN, -_MARGIN - _HEAD)  # downwards, as one reads
    ax.axis("off")
    ax.text(
        0,
        -_HEAD + 4,
        title,
        fontsize=_TEXT + 2,
        color=INK,
        weight="bold",
        va="center",
        parse_math=False,
    )
    return figure, ax


def box_size(box: Box, strip: bool) -> tuple[float, float]:
    """Pixels that a box takes; `strip`: with cells at its lower edge."""
    letters = max(1.08 * len(box.title), 0.86 * len(box.detail), 1.0)
    return max(56.0, _LETTER * letters + 2 * _PAD), _LINE * (2 if box.detail else 1) + _PAD + (
        8 if box.marks else 0
    ) + (_STRIP if strip else 0)


def draw_box(
    ax: Axes,
    box: Box,
    place: Point,
    size: Point,
    marks: Mapping[str, str],
    cells: Sequence[str | None] | None,
) -> None:
    """A box with its text, its marks and, where `cells` are given, their colours."""
    from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

    (x, y), (w, h) = place, size
    outside = box.colour == "outside"
    colour = FAMILY_COLOURS.get(box.colour, QUIET)
    rounding = h / 2 if outside else 4
    fill = PAPER if outside or cells is not None else "#f7f8f9" if not box.colour else _pale(colour)
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2),
            w,
            h,
            boxstyle=f"round,pad=0,rounding_size={rounding}",
            fc=fill,
            ec=FAINT if outside else colour,
            lw=1.1,
            ls="--" if outside else "-",
        )
    )
    text: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False, "clip_on": False}
    middle = y - (4 if box.marks else 0) - (_STRIP / 2 if cells else 0)
    for i, cell in enumerate(cells or ()):
        wide = (w - 10) / len(cells or ())
        corner = (x - w / 2 + 5 + i * wide, y + h / 2 - _STRIP - (9 if box.marks else 1))
        ax.add_patch(
            Rectangle(
                corner,
                wide,
                _STRIP - 3,
                fc=cell or FAINT,
                ec=PAPER,
                lw=0.6,
                hatch=None if cell else "/////",
            )
        )
    ax.text(
        x,
        middle - (_LINE / 2 if box.detail else 0),
        box.title,
        fontsize=_TEXT,
        color=QUIET if outside else INK,
        **text,
    )
    if box.detail:
        ax.text(x, middle + _LINE / 2, box.detail, fontsize=_SMALL, color=QUIET, **text)
    for i, mark in enumerate(box.marks):
        ax.add_patch(
            Circle(
                (x + 11 * (i - (len(box.marks) - 1) / 2), y + h / 2 - 5),
                3.6,
                fc=marks.get(mark, QUIET),
                ec="white",
                lw=0.8,
            )
        )
    if box.title in marks and not box.marks:
        ax.add_patch(Circle((x - w / 2, y - h / 2), 5, fc=marks[box.title], ec="white", lw=0.8))


def _pale(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.84 + 0.16 * c for c in to_rgb(colour))


def draw_curve(ax: Axes, points: list[Point]) -> None:
    """Cubic curves through the points (a start, then three a curve), with an arrow at the end."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    path = Curve(points, [Curve.MOVETO] + [Curve.CURVE4] * (len(points) - 1))
    ax.add_patch(
        FancyArrowPatch(
            path=path,
            arrowstyle="-|>",
            mutation_scale=7,
            color="#9aa3ad",
            lw=0.9,
            shrinkA=0,
            shrinkB=0,
        )
    )
