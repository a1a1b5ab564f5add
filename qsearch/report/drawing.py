"""Draws what `plots.py` computed: figures for a wide screen and for a telephone, as SVG that
follows the page's colours.

Layers stand in order of execution, along the width of a wide figure and down a narrow one, so that
130 names stay readable on both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import FAMILIES, LayerBits, LayerNoise, SizeQuality
from .style import (
    FAINT,
    FAMILY_COLOURS,
    HALF,
    INK,
    PAPER,
    QUIET,
    TEXT,
    WIDE,
    canvas,
    heat_scale,
    layer_figure,
    name_points,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_layer_bits(data: LayerBits, width: int = WIDE) -> Figure:
    """Bars of stored bits, a number of code bits on each, coloured by family of roles; the average
    and the budget as lines.
    """
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
        fontsize=TEXT,
        handlelength=1.4,
        columnspacing=1.4,
        borderpad=0,
    )
    return figure


def draw_layer_noise(data: LayerNoise, width: int = WIDE) -> Figure:
    """Heat map of decibels: layers along the width of a wide figure or down a narrow one, a dot
    where the plan's choice is.
    """
    return styled(lambda: _draw_layer_noise(data, width))


def _draw_layer_noise(data: LayerNoise, width: int) -> Figure:
    from matplotlib.patches import Patch

    wide = width >= HALF
    n, columns = data.decibels.shape
    figure, ax, _ = layer_figure(data.axis, width, across=22 * columns + 16 if wide else 240)
    cells = np.ma.masked_invalid(data.decibels.T if wide else data.decibels)
    ax.patch.set(facecolor=FAINT, hatch="/////", edgecolor=QUIET, linewidth=0)
    norm, scale = heat_scale(data.levels)
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
            fontsize=TEXT,
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


def draw_size_quality(data: SizeQuality, width: int = HALF) -> Figure:
    """Plans as points with one standard error each way, named beside them."""
    return styled(lambda: _draw_size_quality(data, width))


def _draw_size_quality(data: SizeQuality, width: int) -> Figure:
    figure, ax = canvas(width, 300)
    large = max(data.kilobytes, default=1.0)
    unit, name_of_unit = next(
        (u, n)
        for least, u, n in ((1e7, 1e6, "GB"), (1e4, 1e3, "MB"), (0, 1.0, "kB"))
        if large >= least
    )
    for name, kilobytes, mean, error in zip(
        data.plans, data.kilobytes, data.means, data.errors, strict=True
    ):
        size = kilobytes / unit
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
    ax.margins(x=0.25, y=0.15)
    ax.set_xlabel(f"stored size, {name_of_unit}")
    ax.set_ylabel(data.title)
    ax.grid(linewidth=0.6)
    ax.set_axisbelow(True)
    points = zip(data.plans, data.kilobytes, data.means, strict=True)
    name_points(ax, [(name, size / unit, mean) for name, size, mean in points], bold="plan")
    return figure
