"""The page's plots: each drawn for a screen and for a telephone, with words for those who can't see
it; what has nothing to show is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.metrics import metric_words
from . import beeswarm, block_bars, boxes, contributions, drawing, graph_heat, plots, range_heat
from .findings import Findings
from .fold import MANY
from .frontier import draw_frontier
from .style import HALF, NARROW, WIDE
from .svg import svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from ..core.attribution import Attribution

_OUTPUT = "output_sqnr"
_NUMBERS = "The table of all layers has the numbers."


@dataclass(frozen=True)
class Plot:
    """One plot as SVG (already safe) for a wide screen and for a telephone, and its width in pixels
    where it must not be scaled.
    """

    wide: Markup
    narrow: Markup
    pixels: int = 0


def draw_plots(shown: Findings, scheme: str) -> dict[str, Plot]:
    """name -> plot. `scheme`: the one at which layers, roles and blocks are compared."""
    graph, rows = shown.graph, shown.rows
    frontier, attributions = shown.frontier, shown.attributions
    found = _of_layers(shown, scheme)
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
            HALF,
        )
    for name in qualities(rows):
        if name == _OUTPUT and "frontier" in found:  # which has the output's own measured points
            continue
        quality = plots.size_quality(rows, metric=name, title=metric_words(name).long)
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
                HALF,
            )
    for attribution in attributions:
        found |= _of_attribution(graph, attribution)
    return found


def qualities(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measured metrics that are drawn against a plan's size, the output's first."""
    measured = dict.fromkeys(str(m) for row in rows for m in row["metrics"])
    drawn = [name for name in measured if metric_words(name).against_size]
    return sorted(drawn, key=lambda name: name != _OUTPUT)


def _layer_by_layer(shown: Findings, scheme: str) -> dict[str, Plot]:
    """A bar or a cell for every layer; of more than `MANY` the page shows them folded instead."""
    graph, table, plan, metric = shown.graph, shown.table, shown.plan, shown.metric
    bits = plots.layer_bits(graph, plan)
    noise = plots.noise_by_scheme(graph, table, plan, metric=metric)
    steps = plots.noise_by_step(graph, table, scheme, metric=metric)
    label = (
        f"Bars: stored bits a weight of {len(bits.stored)} layers, average {bits.average:.2f}. "
        f"{_NUMBERS}"
    )
    found = {"bits": _drawn("bits", drawing.draw_layer_bits, bits, label)}
    if len(plan.steps) > 1:
        ranges = range_heat.range_bits(graph, plan)
        label = (
            f"Heat map: {ranges.title}, {len(ranges.bits)} layers by {len(ranges.columns)} ranges "
            "of steps."
        )
        found["ranges"] = _drawn("ranges", range_heat.draw_range_bits, ranges, label)
    label = (
        f"Heat map: SQNR in dB, {len(noise.chosen)} layers by {len(noise.columns)} schemes. "
        f"{_NUMBERS}"
    )
    found["noise"] = _drawn("noise", drawing.draw_layer_noise, noise, label)
    if len(steps.columns) > 1:
        label = (
            f"Heat map: SQNR in dB at {scheme}, {len(steps.chosen)} layers by {len(steps.columns)} "
            "step bins."
        )
        found["steps"] = _drawn("steps", drawing.draw_layer_noise, steps, label)
    return found


def _of_layers(shown: Findings, scheme: str) -> dict[str, Plot]:
    graph, table, metric = shown.graph, shown.table, shown.metric
    found = _layer_by_layer(shown, scheme) if len(graph.layers) <= MANY else {}
    roles = boxes.role_boxes({graph.model: (graph, table)}, scheme, metric=metric)
    label = f"Boxes: {roles.title}, by role; from the most sensitive: {', '.join(roles.roles)}."
    found["roles"] = _drawn("roles", boxes.draw_role_boxes, roles, label, HALF)
    if graph.blocks and len(graph.layers) <= MANY:
        bars = block_bars.block_bars(graph, table, scheme, metric=metric)
        label = f"Bars: noise of {len(bars.noise)} blocks at {scheme}, in order of execution."
        found["blocks"] = _drawn("blocks", block_bars.draw_block_bars, bars, label)
    if graph.blocks:
        heat = graph_heat.graph_heat(graph, table, scheme, metric=metric)
        found["graph"] = _unscaled(
            "graph",
            graph_heat.draw_graph_heat(heat),
            f"The graph of {graph.model}, a coloured cell a block: {heat.title}.",
        )
    return found


def _of_attribution(graph: OpGraph, attribution: Attribution) -> dict[str, Plot]:
    """Bars for what explains the plan by its layers, a swarm for what explains many plans by
    features.
    """
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
                HALF,
            )
        elif kind == "feature" and len(plans) > 1 and "beeswarm" not in found:
            swarm = beeswarm.beeswarm(attribution, metric=metric, method=method)
            words = (
                f"Dots: what {len(swarm.rows)} features {swarm.title} of {len(plans)} plans: "
                f"{'; '.join(swarm.rows)}."
            )
            found["beeswarm"] = _drawn("beeswarm", beeswarm.draw_beeswarm, swarm, words, HALF)
    return found


def _drawn(
    name: str, draw: Callable[[Any, int], Figure], data: Any, label: str, wide: int = WIDE
) -> Plot:
    from markupsafe import Markup

    # Markup: matplotlib escapes what it writes, and `svg` the label.
    sheets = [
        Markup(svg(draw(data, width), key=f"{name}-{width}", label=label))
        for width in (wide, NARROW)
    ]
    return Plot(sheets[0], sheets[1])


def _unscaled(name: str, figure: Figure, label: str) -> Plot:
    from markupsafe import Markup

    pixels = round(float(figure.get_size_inches()[0]) * 96)
    once = Markup(svg(figure, key=name, label=label))
    return Plot(once, once, pixels)
