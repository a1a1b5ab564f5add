"""The page's plots: each drawn for a screen and for a telephone, with words for those who can't see it; what has nothing to show is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.table import SensitivityTable
from . import beeswarm, block_bars, boxes, contributions, drawing, graph_heat, plots, tables
from .frontier import Frontier, draw_frontier

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from ..core.attribution import Attribution

QUALITIES = ("output_sqnr", "sqnr")  # metrics that are drawn against size
_NUMBERS = "The table of all layers has the numbers."


@dataclass(frozen=True)
class Plot:
    """One plot as SVG (already safe) for a wide screen and for a telephone, and its width in pixels where it must not be scaled."""

    wide: Markup
    narrow: Markup
    pixels: int = 0


def draw_plots(
    graph: OpGraph,
    table: SensitivityTable,
    plan: BitPlan,
    rows: Sequence[Mapping[str, Any]],
    scheme: str,
    metric: str,
    *,
    frontier: Frontier | None = None,
    attributions: Sequence[Attribution] = (),
) -> dict[str, Plot]:
    """name -> plot. `scheme`: the one at which layers, roles and blocks are compared; `rows`: results of the run."""
    found = _of_layers(graph, table, plan, scheme, metric)
    if frontier is not None and (frontier.bits or frontier.measured):
        points = ", ".join(
            f"{bits:.2f} bits {quality:.1f}"
            for bits, quality in zip(frontier.bits, frontier.quality, strict=True)
        )
        found["frontier"] = _drawn(
            "frontier",
            draw_frontier,
            frontier,
            f"Curve: stored bits a weight and {frontier.title}: {points}.",
            drawing.HALF,
        )
    for name in QUALITIES[
        int("frontier" in found) :
    ]:  # the frontier has the output's own measured points
        quality = plots.size_quality(rows, metric=name, title=tables.TITLES[name])
        if quality.plans:
            points = ", ".join(
                f"{p} {size:,.0f} kB {mean:.1f}"
                for p, size, mean in zip(
                    quality.plans, quality.kilobytes, quality.means, strict=True
                )
            )
            found[name] = _drawn(
                name,
                drawing.draw_size_quality,
                quality,
                f"Points: size and {quality.title}: {points}.",
                drawing.HALF,
            )
    for attribution in attributions:
        found |= _of_attribution(graph, attribution)
    return found


def _of_layers(
    graph: OpGraph, table: SensitivityTable, plan: BitPlan, scheme: str, metric: str
) -> dict[str, Plot]:
    bits = plots.layer_bits(graph, plan)
    noise = plots.noise_by_scheme(graph, table, plan, metric=metric)
    steps = plots.noise_by_step(graph, table, scheme, metric=metric)
    roles = boxes.role_boxes({graph.model: (graph, table)}, scheme, metric=metric)
    label = f"Bars: stored bits a weight of {len(bits.stored)} layers, average {bits.average:.2f}. {_NUMBERS}"
    found = {"bits": _drawn("bits", drawing.draw_layer_bits, bits, label)}
    label = f"Heat map: SQNR in dB, {len(noise.chosen)} layers by {len(noise.columns)} schemes. {_NUMBERS}"
    found["noise"] = _drawn("noise", drawing.draw_layer_noise, noise, label)
    if len(steps.columns) > 1:
        label = f"Heat map: SQNR in dB at {scheme}, {len(steps.chosen)} layers by {len(steps.columns)} step bins."
        found["steps"] = _drawn("steps", drawing.draw_layer_noise, steps, label)
    label = f"Boxes: {roles.title}, by role; from the most sensitive: {', '.join(roles.roles)}."
    found["roles"] = _drawn("roles", boxes.draw_role_boxes, roles, label, drawing.HALF)
    if graph.blocks:
        bars = block_bars.block_bars(graph, table, scheme, metric=metric)
        label = f"Bars: noise of {len(bars.noise)} blocks at {scheme}, in order of execution."
        found["blocks"] = _drawn("blocks", block_bars.draw_block_bars, bars, label)
        heat = graph_heat.graph_heat(graph, table, scheme, metric=metric)
        found["graph"] = _unscaled(
            "graph",
            graph_heat.draw_graph_heat(heat),
            f"The graph of {graph.model}, a coloured cell a block: {heat.title}.",
        )
    return found


def _of_attribution(graph: OpGraph, attribution: Attribution) -> dict[str, Plot]:
    """Bars for what explains the plan by its layers, a swarm for what explains many plans by features."""
    found: dict[str, Plot] = {}
    kinds: Any = attribution.frame[["method", "kind", "metric"]].drop_duplicates()
    for method, kind, metric in kinds.itertuples(index=False):
        plans = list(attribution.select(method=method, kind=kind, metric=metric)["plan"].unique())
        if kind == "layer" and "plan" in plans and "contributions" not in found:
            bars = contributions.contributions(
                graph, attribution, plan="plan", metric=metric, method=method
            )
            words = "; ".join(f"{name} {value:.2g}" for name, _, value, *_ in bars.rows)
            found["contributions"] = _drawn(
                "contributions",
                contributions.draw_contributions,
                bars,
                f"Bars: {bars.title} of the plan: {words}.",
                drawing.HALF,
            )
        elif kind == "feature" and len(plans) > 1 and "beeswarm" not in found:
            swarm = beeswarm.beeswarm(attribution, metric=metric, method=method)
            words = f"Dots: what {len(swarm.rows)} features {swarm.title} of {len(plans)} plans: {'; '.join(swarm.rows)}."
            found["beeswarm"] = _drawn(
                "beeswarm", beeswarm.draw_beeswarm, swarm, words, drawing.HALF
            )
    return found


def _drawn(
    name: str, draw: Callable[[Any, int], Figure], data: Any, label: str, wide: int = drawing.WIDE
) -> Plot:
    from markupsafe import Markup

    # Markup: matplotlib escapes what it writes, and `drawing.svg` the label.
    sheets = [
        Markup(drawing.svg(draw(data, width), key=f"{name}-{width}", label=label))
        for width in (wide, drawing.NARROW)
    ]
    return Plot(sheets[0], sheets[1])


def _unscaled(name: str, figure: Figure, label: str) -> Plot:
    from markupsafe import Markup

    pixels = round(float(figure.get_size_inches()[0]) * 96)
    once = Markup(drawing.svg(figure, key=name, label=label))
    return Plot(once, once, pixels)
