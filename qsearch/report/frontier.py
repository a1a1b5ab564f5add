"""The size-error frontier as a picture: planned budgets as a line, uniform plans as points beside it. One function computes, one draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import KEEP
from .drawing import FAMILY_COLOURS, HALF, INK, canvas, styled
from .plots import by_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Frontier:
    """Stored bits a weight and predicted quality of planned and uniform plans; `title`: what the quality is, more is better."""

    bits: tuple[float, ...]
    quality: tuple[float, ...]
    uniform: tuple[tuple[str, float, float], ...]
    title: str


def frontier(graph: OpGraph, values: Mapping[str, Mapping[str, float]], plans: Sequence[BitPlan], *, power: bool = True) -> Frontier:
    """The curve of `plans` by their own objective, and every scheme that `values` (layer -> scheme -> loss) has for all layers, uniformly.

    `power`: the loss is a noise power and is shown as SQNR in dB; any other is shown with its sign turned.
    """

    def quality(loss: float) -> float:
        return -loss if not power else -10 * math.log10(loss) if loss > 0 else math.nan

    shown = [(p.achieved.average_bits, q) for p in plans if p.solver.objective is not None and math.isfinite(q := quality(p.solver.objective))]
    uniform = []
    for scheme in by_size(graph, {s for row in values.values() for s in row} - {str(KEEP)}):
        if all(scheme in values[layer.name] for layer in graph.quantizable):
            loss = quality(math.fsum(values[layer.name][scheme] for layer in graph.quantizable))
            if math.isfinite(loss):
                uniform.append((scheme, BitPlan.uniform(graph, scheme).achieved.average_bits, loss))
    bits, height = zip(*sorted(shown), strict=True) if shown else ((), ())
    return Frontier(bits, height, tuple(uniform), "predicted SQNR of the output, dB" if power else "predicted loss, its sign turned")


def draw_frontier(data: Frontier, width: int = HALF) -> Figure:
    """The planned curve, and uniform plans with their names beside it."""
    return styled(lambda: _draw(data, width))


def _draw(data: Frontier, width: int) -> Figure:
    figure, ax = canvas(width, 340)
    ours, theirs = FAMILY_COLOURS["self-attention"], FAMILY_COLOURS["cross-attention"]
    ax.plot(data.bits, data.quality, color=ours, marker="D", markersize=4, linewidth=1.6, label="planned")
    for name, bits, quality in data.uniform:
        ax.plot([bits], [quality], color=theirs, marker="s", markersize=6, linestyle="none")
        ax.annotate(name, (bits, quality), (7, -9), textcoords="offset points", color=INK)
    ax.plot([], [], color=theirs, marker="s", markersize=6, linestyle="none", label="uniform")
    ax.set_xlabel("stored bits a weight")
    ax.set_ylabel(data.title)
    ax.grid(linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right")
    ax.margins(x=0.08, y=0.08)
    return figure
