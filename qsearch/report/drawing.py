"""Draws what `plots.py` computed: figures for a wide screen and for a telephone, as SVG that follows the page's colours.

Layers stand in order of execution, along the width of a wide figure and down a narrow one, so that 130 names stay readable on both.
Role colours are Okabe and Ito's, the noise scale is viridis: colour-blind readers can tell them apart, and place or name says the same.
Figures are `matplotlib.figure.Figure`, never pyplot's: no display, no global state.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifacts import write_text
from .plots import FAMILIES, LayerAxis, LayerBits, LayerNoise, SizeQuality

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
_PAGE = {
    "ink": INK,
    "quiet": QUIET,
    "faint": FAINT,
    "paper": PAPER,
    "raised": RAISED,
}  # what a page in a dark scheme has colours of its own for
_TEXT = 7.5  # points: ten pixels
_STYLE: dict[Any, Any] = {
    "font.size": _TEXT,
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


def draw_layer_bits(data: LayerBits, width: int = WIDE) -> Figure:
    """Bars of stored bits, a number of code bits on each, coloured by family of roles; the average and the budget as lines."""
    return styled(lambda: _draw_layer_bits(data, width))


def _draw_layer_bits(data: LayerBits, width: int) -> Figure:
    from matplotlib.patches import Patch

    wide, n = width >= HALF, len(data.stored)
    figure, ax, text = layer_figure(data.axis, width, across=190 if wide else 240)
    colours = [FAMILY_COLOURS[f] for f in data.families]
    bars = (
        ax.bar(range(n), data.stored, 0.78, color=colours)
        if wide
        else ax.barh(range(n), data.stored, 0.78, color=colours)
    )
    ax.bar_label(
        bars, [str(c) for c in data.codes], padding=1.5, fontsize=min(text, 6.5), color=QUIET
    )
    line: Callable[..., Any] = ax.axhline if wide else ax.axvline
    names = [
        f"average {data.average:.2f}"
        + (f", limit {data.limit:g}" if data.limit is not None else "")
    ]
    handles: list[Any] = [line(data.average, color=INK, linewidth=1, linestyle=(0, (4, 2)))]
    for name in FAMILIES:
        if name in data.families:
            handles.append(Patch(color=FAMILY_COLOURS[name]))
            names.append(name)
    top = 1.1 * max(data.stored)
    (ax.set_yticks if wide else ax.set_xticks)([t for t in (0, 2, 4, 6, 8, 12, 16) if t <= top])
    (ax.set_ylim if wide else ax.set_xlim)(0, top)
    (ax.set_ylabel if wide else ax.set_xlabel)("stored bits a weight")
    ax.grid(axis="y" if wide else "x", linewidth=0.6)
    ax.set_axisbelow(True)
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=len(names) if wide else 2,
        fontsize=_TEXT,
        handlelength=1.4,
        columnspacing=1.4,
        borderpad=0,
    )
    return figure


def draw_layer_noise(data: LayerNoise, width: int = WIDE) -> Figure:
    """Heat map of decibels: layers along the width of a wide figure or down a narrow one, a dot where the plan's choice is."""
    return styled(lambda: _draw_layer_noise(data, width))


def _draw_layer_noise(data: LayerNoise, width: int) -> Figure:
    from matplotlib.patches import Patch

    wide = width >= HALF
    n, columns = data.decibels.shape
    figure, ax, _ = layer_figure(data.axis, width, across=22 * columns + 16 if wide else 240)
    cells = np.ma.masked_invalid(data.decibels.T if wide else data.decibels)
    ax.patch.set(facecolor=FAINT, hatch="/////", edgecolor=QUIET, linewidth=0)
    norm, scale = _scale(data.levels)
    x, y = (n, columns) if wide else (columns, n)
    mesh = ax.pcolormesh(
        np.arange(x + 1) - 0.5,
        np.arange(y + 1) - 0.5,
        cells,
        cmap=scale,
        norm=norm,
        edgecolors=PAPER,
        linewidth=0.4,
    )
    across = ax.yaxis if wide else ax.xaxis
    across.set_ticks(range(columns), data.columns)
    across.set_label_text(data.column_title)
    if wide:
        ax.set_ylim(columns - 0.5, -0.5)
    else:
        ax.set_xlim(-0.5, columns - 0.5)
        ax.tick_params(
            axis="x", labelrotation=30 if max(map(len, data.columns)) * columns > 32 else 0
        )
    for span in data.axis.spans[1:]:
        (ax.axvline if wide else ax.axhline)(span.start - 0.5, color=PAPER, linewidth=2)
    places = [(i, c) for i, c in enumerate(data.chosen) if c >= 0]
    handles: list[Any] = []
    words = []
    if places:
        layers, chosen = zip(*places, strict=True)
        handles.append(
            ax.scatter(
                *((layers, chosen) if wide else (chosen, layers)),
                s=9,
                c="#ffffff",
                edgecolors="#000000",
                linewidths=0.7,
                zorder=3,
            )
        )
        words.append("the plan's choice")
    if cells.mask.any():
        handles.append(Patch(facecolor=FAINT, hatch="/////", edgecolor=QUIET, linewidth=0))
        words.append("at the measurement floor, or not measured")
    if handles:
        figure.legend(
            handles,
            words,
            loc="outside upper left",
            fontsize=_TEXT,
            borderpad=0,
            handletextpad=0.4,
            ncols=2 if wide else 1,
        )
    bar = figure.colorbar(
        mesh,
        ax=ax,
        location="right" if wide else "bottom",
        pad=0.01,
        aspect=12 if wide else 30,
        fraction=0.02 if wide else 0.05,
    )
    bar.set_label("SQNR, dB" if wide else "SQNR, dB (less is worse)")
    bar.set_ticks(list(data.levels[:: 2 if len(data.levels) > 6 else 1]))
    bar.outline.set_visible(False)
    return figure


def _scale(levels: Sequence[float]) -> tuple[Any, Any]:
    """Of a heat map: the steps of its colours, and viridis turned, whose lightness falls all the way, so that it reads in grey as well."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    return BoundaryNorm(list(levels), ncolors=256), colormaps["viridis_r"]


def colour_steps(levels: Sequence[float]) -> tuple[Callable[[float], str], list[str]]:
    """The heat maps' colour of a number, and the colour of each step between two levels."""
    from matplotlib.colors import to_hex

    norm, scale = _scale(levels)
    return lambda x: to_hex(scale(norm(x))), [to_hex(scale(norm(x))) for x in levels[:-1]]


def draw_size_quality(data: SizeQuality, width: int = HALF) -> Figure:
    """Plans as points with one standard error each way, named beside them; size begins at zero."""
    return styled(lambda: _draw_size_quality(data, width))


def _draw_size_quality(data: SizeQuality, width: int) -> Figure:
    figure, ax = canvas(width, 300)
    for name, size, mean, error in zip(
        data.plans, data.kilobytes, data.means, data.errors, strict=True
    ):
        ours = name == "plan"
        colour = (
            FAMILY_COLOURS["self-attention"]
            if ours
            else FAMILY_COLOURS["cross-attention"]
            if name.startswith("uniform")
            else QUIET
        )
        marker = "D" if ours else "s" if name.startswith("uniform") else "o"
        ax.errorbar(
            size,
            mean,
            yerr=error,
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=3,
            elinewidth=1.2,
        )
        ax.annotate(
            name,
            (size, mean),
            (-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            weight="bold" if ours else "normal",
        )
    ax.set_xlim(0, 1.12 * max(data.kilobytes, default=1.0))
    ax.margins(y=0.15)
    ax.set_xlabel("stored size, kB")
    ax.set_ylabel(data.title)
    ax.grid(linewidth=0.6)
    ax.set_axisbelow(True)
    return figure


def svg(figure: Figure, *, key: str, label: str) -> str:
    """The figure as an SVG element for an HTML page: text stays text, ids begin with `key`, colours are the page's `--ink`, `--quiet`, `--faint`, `--paper`, `--raised`.

    `label` is what it says to those who can't see it. The same figure gives the same text every time.
    """
    import matplotlib
    from markupsafe import escape

    file = io.StringIO()
    with (
        matplotlib.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": key}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # the reader's browser has its own fonts
        figure.savefig(
            file,
            format="svg",
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            transparent=True,
        )
    text = file.getvalue()
    text = re.sub(
        r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL
    )  # it would hold for the whole page
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(
        r'\b(?:d|x|y|transform)="[^"]*"',
        lambda m: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(m[0].split())),
        text,
    )  # half the size
    text = re.sub(r'font-family: [^;"<]*', "font-family: inherit", text)
    for name, colour in _PAGE.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    size = r'width="[^"]*" height="[^"]*" '  # the page gives it one; the viewBox keeps the shape
    return re.sub(
        rf"<svg ([^>]*?){size}", rf'<svg role="img" aria-label="{escape(label)}" \1', text, count=1
    )


def save_svg(path: Path, figure: Figure, *, label: str) -> None:
    """The figure as a file of its own, with the light colours of a page filled in."""
    text = svg(figure, key="alone", label=label)
    for name, colour in _PAGE.items():
        text = text.replace(f"var(--{name})", colour)
    text = (
        text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        if " xmlns=" not in text
        else text
    )
    write_text(path, text.replace("font-family: inherit", "font-family: sans-serif"))


def styled(draw: Callable[[], Figure]) -> Figure:
    """What `draw` makes in the style of the page."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return draw()


def shortened(name: str, longest: int) -> str:
    """A name whose middle gives way where it is too long: its beginning says where the layer is, its end what it is."""
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def power_of_ten(power: int) -> str:
    """0.01, 1, 100 as they are; what would be longer as 10⁻⁵."""
    return (
        f"{10.0**power:g}"
        if abs(power) <= 2
        else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def scaled(ax: Axes, label: str) -> None:
    """Label the horizontal axis, with the power of ten in which its numbers are short where they are very small or large."""
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
    """A name beside each point, at the first of eight places that is free of names, of points and of the `line`; the name `bold` is set so.

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
        wide, high, gap = 5.4 * len(name) * (1.1 if name == bold else 1), 10.0, 9.0
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
    """Figure and axes with the layers on one axis, blocks named and shaded, and the size of their text in points. `across`: pixels of the other axis."""
    wide, n = width >= HALF, len(axis.names)
    pitch = (width - 110) / n if wide else 13.0
    text = min(_TEXT, pitch / 1.4)
    named = text >= 4.5  # smaller is no text
    figure, ax = canvas(
        width,
        across + 60 + (6.2 * max(map(len, axis.labels)) * text / _TEXT if named else 0)
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
    title += f"; {axis.key}" if axis.key else ""
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
