"""The style of the report's figures: palette, sizes, axes of layers, names beside points.

Role colours are Okabe and Ito's, the noise scale is viridis: colour-blind readers can tell them
apart, and place or name says the same. Figures are `matplotlib.figure.Figure`, never pyplot's: no
display, no global state.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .plots import FAMILIES, LayerAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, FAINT, PAPER, RAISED = "#1c2024", "#5c6570", "#d5d9de", "#fefefe", "#f4f5f7"
FAMILY_COLOURS = dict(
    zip(
        FAMILIES,
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8f98"),
        strict=True,
    )
)
WIDE, NARROW, HALF = 1200, 360, 560  # widths in CSS pixels
TEXT = 7.5  # points: ten pixels
STYLE: dict[Any, Any] = {
    "font.size": TEXT,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a layer's name is a letter
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # `svg` takes it off again
    "grid.color": FAINT,
    "hatch.color": QUIET,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def heat_scale(levels: Sequence[float]) -> tuple[Any, Any]:
    """Of a heat map: the steps of its colours, and viridis turned, whose lightness falls all the
    way, so that it reads in grey as well.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    return BoundaryNorm(list(levels), ncolors=256), colormaps["viridis_r"]


def colour_steps(levels: Sequence[float]) -> tuple[Callable[[float], str], list[str]]:
    """The heat maps' colour of a number, and the colour of each step between two levels."""
    from matplotlib.colors import to_hex

    norm, scale = heat_scale(levels)
    return lambda x: to_hex(scale(norm(x))), [to_hex(scale(norm(x))) for x in levels[:-1]]


def styled(draw: Callable[[], Figure]) -> Figure:
    """What `draw` makes in the style of the page."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return draw()


def shortened(name: str, longest: int) -> str:
    """A name whose middle gives way where it is too long: its beginning says where the layer is,
    its end what it is.
    """
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def power_of_ten(power: int) -> str:
    """0.01, 1, 100 as they are; what would be longer as 10⁻⁵."""
    return (
        f"{10.0**power:g}"
        if abs(power) <= 2
        else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def scaled(ax: Axes, label: str) -> None:
    """Label the horizontal axis, with the power of ten in which its numbers are short where they
    are very small or large.
    """
    power = math.floor(math.log10(max(map(abs, ax.get_xlim()))))
    small = not -3 <= power < 4
    if small:
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 10.0**power:g}")
    ax.set_xlabel(
        f"{label}, in {power_of_ten(power)}" if small else label, loc="right"
    )  # it may be wider than the axis


def name_points(
    ax: Axes,
    points: Sequence[tuple[str, float, float]],
    line: Sequence[tuple[float, float]] = (),
    *,
    bold: str = "",
) -> None:
    """A name beside each point, at the first of eight places that is free of names, of points and
    of the `line`; the name `bold` is set so.

    Call it when all is drawn: it asks the axes where things lie.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None  # axes without one were never drawn
    figure.draw_without_rendering()
    inside = ax.get_window_extent()
    at = [tuple(ax.transData.transform((x, y))) for _, x, y in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for a, b in itertools.pairwise(ax.transData.transform((x, y)) for x, y in line):
        taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in (a + (b - a) * i / 8 for i in range(9))]
    for (name, *place), (x, y) in sorted(
        zip(points, at, strict=True), key=lambda found: found[0][0] != bold
    ):
        wide, high, gap = 6.2 * len(name) * (1.1 if name == bold else 1), 10.0, 9.0
        places = [
            (gap, -gap),
            (gap, gap),
            (-gap - wide, gap),
            (-gap - wide, -gap),
            (-wide / 2, -1.9 * gap),
            (-wide / 2, 1.9 * gap),
            (gap, 0),
            (-gap - wide, 0),
        ]
        boxes = [(x + dx, y + dy - high / 2, x + dx + wide, y + dy + high / 2) for dx, dy in places]
        within = [
            inside.x0 <= b[0] and b[2] <= inside.x1 and inside.y0 <= b[1] and b[3] <= inside.y1
            for b in boxes
        ]
        cost = [
            sum(_overlap(box, other) for other in taken) + 1e4 * (not fits)
            for box, fits in zip(boxes, within, strict=True)
        ]
        best = cost.index(min(cost))
        taken.append(boxes[best])
        dx, dy = places[best]
        weight = "bold" if name == bold else "normal"
        offset = (0.75 * dx, 0.75 * dy)  # points of type, whatever the pixels of a file
        ax.annotate(
            name,
            (place[0], place[1]),
            offset,
            textcoords="offset points",
            va="center",
            color=INK,
            weight=weight,
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def canvas(width: int, height: float) -> tuple[Figure, Axes]:
    """An empty figure of that many CSS pixels, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 96, height / 96), dpi=96, layout="constrained")
    figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72)  # type: ignore[union-attr, call-arg]
    return figure, figure.add_subplot()


def layer_figure(
    axis: LayerAxis, width: int, *, across: float, title: str = "layers in order of execution"
) -> tuple[Figure, Axes, float]:
    """Figure and axes with the layers on one axis, blocks named and shaded, and the size of their
    text in points. `across`: pixels of the other axis.
    """
    wide, n = width >= HALF, len(axis.names)
    pitch = (width - 110) / n if wide else 13.0
    text = min(TEXT, pitch / 1.4)
    named = text >= 4.5  # smaller is no text
    title += f"; {axis.key}" if axis.key else ""
    # A key of many names takes several lines: as one it would leave the axes no room.
    lines = textwrap.wrap(title, max(20, int((width if wide else 130 + pitch * n) / 5.5)))
    more = 14 * (len(lines) - 1)
    figure, ax = canvas(
        width,
        across + 60 + more + (6.2 * max(map(len, axis.labels)) * text / TEXT if named else 0)
        if wide
        else 130 + pitch * n,
    )
    along = ax.xaxis if wide else ax.yaxis
    # Anchored at its end, so that a browser's narrower font leaves no gap to the axis.
    turned: dict[str, Any] = (
        {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"} if wide else {}
    )
    along.set_ticks(
        range(n) if named else [], axis.labels if named else [], fontsize=text, **turned
    )
    along.set_tick_params(length=0, pad=3)
    title = "\n".join(lines)
    ax.set_xlabel(title) if wide else ax.set_ylabel(title, loc="top")
    ax.set_xlim(-0.5, n - 0.5) if wide else ax.set_ylim(n - 0.5, -0.5)
    for i, span in enumerate(axis.spans):
        if i % 2:
            (ax.axvspan if wide else ax.axhspan)(
                span.start - 0.5, span.stop - 0.5, facecolor=INK, alpha=0.06, linewidth=0, zorder=0
            )
        middle = (span.start + span.stop - 1) / 2
        if (span.stop - span.start) * pitch < (5.5 * len(span.label) + 3 if wide else 11):
            continue  # no room for its name
        if wide:
            ax.text(
                middle,
                1.01,
                span.label,
                transform=ax.get_xaxis_transform(),
                ha="center",
                va="bottom",
                color=QUIET,
            )
        else:
            ax.text(
                1.01,
                middle,
                span.label,
                transform=ax.get_yaxis_transform(),
                ha="left",
                va="center",
                color=QUIET,
            )
    return figure, ax, text
