"""What each layer adds to the predicted error of one plan: bars with error bars, the largest first,
which add up to the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.sites import cut, is_site
from .plots import FAMILIES, family, short_names
from .style import FAINT, FAMILY_COLOURS, HALF, INK, QUIET, canvas, scaled, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..core.attribution import Attribution


@dataclass(frozen=True)
class Contributions:
    """`rows`: (layer or site, its choice, value, standard error or NaN, family of its role),
    largest value first; `rest`: (how many others, their sum).

    `base` + values + rest = `prediction`. `labels`: short names of the rows' layers, and `key`,
    what they abbreviate. `title`: what is added to what.
    """

    rows: tuple[tuple[str, str, float, float, str], ...]
    rest: tuple[int, float]
    base: float
    prediction: float
    labels: tuple[str, ...]
    key: str
    title: str


def contributions(
    graph: OpGraph,
    attribution: Attribution,
    *,
    plan: str,
    metric: str,
    method: str,
    count: int = 15,
) -> Contributions:
    """The `count` layers and sites that add most, step bins added up."""
    frame: Any = attribution.select(plan=plan, method=method, kind="layer", metric=metric)
    sums = frame.groupby("name", sort=False).agg(
        {
            "value": "sum",
            "error": lambda e: math.sqrt(float((e**2).sum(skipna=False))),
            "choice": "first",
        }
    )
    sums = sums.sort_values("value", ascending=False, kind="stable")
    shown, hidden = sums.iloc[:count], sums.iloc[count:]
    rows = tuple(
        (
            str(name),
            str(x.choice),
            float(x.value),
            float(x.error),
            _family(graph, str(name)),
        )
        for name, x in shown.iterrows()
    )
    base, prediction = float(frame["base"].iloc[0]), float(frame["prediction"].iloc[0])
    short, key = short_names(graph.layers)
    rest = (len(hidden), float(hidden["value"].sum()))
    return Contributions(
        rows,
        rest,
        base,
        prediction,
        tuple(_label(short, name) for name, *_ in rows),
        key,
        f"added to predicted {metric}",
    )


def _family(graph: OpGraph, name: str) -> str:
    if not is_site(name):
        return family(graph.layer(name).role)
    return f"{'self' if cut(name)[0] in graph.self_attentions else 'cross'}-attention"


def _label(short: Mapping[str, str], name: str) -> str:
    """A layer's short name; a site's is made of that of a layer in the same attention."""
    if not is_site(name):
        return short[name]
    module, part = cut(name)
    inside = next((layer for layer in short if layer.startswith(f"{module}.")), None)
    if inside is None or not short[inside].endswith(rest := inside.removeprefix(module)):
        return name
    return f"{short[inside].removesuffix(rest)}:{part}"


def draw_contributions(data: Contributions, width: int = HALF) -> Figure:
    """A bar a layer coloured by the family of its role, its choice beside its name; the others
    together below.
    """
    return styled(lambda: _draw(data, width))


def _draw(data: Contributions, width: int) -> Figure:
    from matplotlib.patches import Patch

    count, rest = data.rest
    figure, ax = canvas(width, 90 + 17 * (len(data.rows) + (count > 0)))
    for i, (_, _, value, error, kind) in enumerate(data.rows):
        ax.barh(i, value, 0.74, color=FAMILY_COLOURS[kind])
        if math.isfinite(error):
            ax.errorbar(value, i, xerr=error, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    labels = [f"{label}  {row[1]}" for label, row in zip(data.labels, data.rows, strict=True)]
    if count:
        ax.barh(
            len(data.rows), rest, 0.74, color=FAINT, edgecolor=QUIET, hatch="/////", linewidth=0.6
        )
        labels.append(f"the other {count} together")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.axvline(0, color=QUIET, linewidth=0.8)
    scaled(ax, data.title)
    if data.key:
        ax.set_xlabel("\n".join([ax.get_xlabel(), *wrap(data.key, width // 7)]), loc="right")
    if width < HALF:  # of more ticks the numbers would lie on each other
        ax.locator_params(axis="x", nbins=4)
    ax.grid(axis="x", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    held = [name for name in FAMILIES if any(row[4] == name for row in data.rows)]
    figure.legend(
        [Patch(color=FAMILY_COLOURS[name]) for name in held],
        held,
        loc="outside upper left",
        ncols=3,
        handlelength=1.2,
        columnspacing=1.2,
        borderpad=0,
    )
    return figure
