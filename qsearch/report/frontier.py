"""The size-error frontier as a picture: planned budgets as a line, uniform plans as points beside
it, and plans that were measured.

One function computes, one draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import KEEP
from .plots import FULL_PRECISION, by_size
from .style import FAMILY_COLOURS, HALF, QUIET, canvas, name_points, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Frontier:
    """Stored bits a weight and predicted quality of planned and uniform plans; `title`: what the
    quality is, more is better.

    `uniform`: (scheme, bits, quality). `measured`: (plan, bits, measured quality, its standard
    error), where it is the same quantity.
    """

    bits: tuple[float, ...]
    quality: tuple[float, ...]
    uniform: tuple[tuple[str, float, float], ...]
    title: str
    measured: tuple[tuple[str, float, float, float], ...] = ()


def frontier(
    graph: OpGraph,
    values: Mapping[str, Mapping[str, float]],
    plans: Sequence[Plan],
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    power: bool = True,
) -> Frontier:
    """The curve of `plans` by their own objective, and every scheme that `values` (layer -> scheme
    -> loss) has for all layers, uniformly.

    `rows`: results of a run, whose measured `output_sqnr` stands beside what was predicted.
    `power`: the loss is a noise power and is shown as SQNR in dB; any other is shown with its sign
    turned, and has no measured twin.
    """

    def quality(loss: float) -> float:
        return -loss if not power else -10 * math.log10(loss) if loss > 0 else math.nan

    shown = [
        (p.achieved.average_bits, q)
        for p in plans
        if p.solver.objective is not None and math.isfinite(q := quality(p.solver.objective))
    ]
    uniform = []
    for scheme in by_size(graph, {s for row in values.values() for s in row} - {str(KEEP)}):
        if all(scheme in values[layer.name] for layer in graph.quantizable):
            loss = quality(math.fsum(values[layer.name][scheme] for layer in graph.quantizable))
            if math.isfinite(loss):
                uniform.append((scheme, Plan.uniform(graph, scheme).achieved.average_bits, loss))
    bits, height = zip(*sorted(shown), strict=True) if shown else ((), ())
    held = [
        (str(r["plan"]), float(r["average_bits"]), r["metrics"]["output_sqnr"])
        for r in rows
        if power and "output_sqnr" in r["metrics"]
    ]
    measured = [(name, bits, float(mean), float(error)) for name, bits, (mean, error) in held]
    title = (
        "SQNR of the output, dB"
        if measured
        else "predicted SQNR of the output, dB"
        if power
        else "predicted loss, its sign turned"
    )
    return Frontier(
        bits, height, tuple(uniform), title, tuple(m for m in measured if m[0] != FULL_PRECISION)
    )


def draw_frontier(data: Frontier, width: int = HALF) -> Figure:
    """The planned curve, uniform plans with their names beside it, and measured plans as hollow
    marks with one standard error each way.
    """
    return styled(lambda: _draw(data, width))


def _draw(data: Frontier, width: int) -> Figure:
    figure, ax = canvas(width, 340)
    ours, theirs = FAMILY_COLOURS["self-attention"], FAMILY_COLOURS["cross-attention"]
    ax.plot(
        data.bits,
        data.quality,
        color=ours,
        marker="D",
        markersize=4,
        linewidth=1.6,
        label="planned" + (", predicted" if data.measured else ""),
    )
    for _, bits, quality in data.uniform:
        ax.plot([bits], [quality], color=theirs, marker="s", markersize=5, linestyle="none")
    ax.plot(
        [],
        [],
        color=theirs,
        marker="s",
        markersize=5,
        linestyle="none",
        label="uniform" + (", predicted" if data.measured else ""),
    )
    for name, bits, quality, error in data.measured:
        colour = ours if name == "plan" else theirs if name.startswith("uniform") else QUIET
        ax.errorbar(
            bits,
            quality,
            yerr=error,
            fmt="o",
            color=colour,
            markerfacecolor="none",
            markersize=9,
            markeredgewidth=1.6,
            capsize=3,
            elinewidth=1.2,
        )
    if data.measured:
        ax.plot(
            [],
            [],
            color=QUIET,
            marker="o",
            markerfacecolor="none",
            markersize=8,
            markeredgewidth=1.6,
            linestyle="none",
            label="measured",
        )
    ax.set_xlabel("stored bits a weight")
    ax.set_ylabel(data.title)
    ax.grid(linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right")
    ax.margins(x=0.08, y=0.08)
    points = [
        *data.uniform,
        *(
            (name, bits, quality)
            for name, bits, quality, _ in data.measured
            if not name.startswith("uniform")
        ),
    ]
    name_points(ax, points, list(zip(data.bits, data.quality, strict=True)), bold="plan")
    return figure
