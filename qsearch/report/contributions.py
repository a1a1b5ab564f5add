"""What each layer adds to the predicted error of one plan: bars with error bars, the largest first, which add up to the prediction."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from .drawing import FAINT, FAMILY_COLOURS, HALF, INK, QUIET, canvas, styled
from .plots import FAMILIES, family

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..core.attribution import Attribution


@dataclass(frozen=True)
class Contributions:
    """`rows`: (layer, its choice, value, standard error or NaN, family of its role), largest value first; `rest`: (how many others, their sum).

    `base` + values + rest = `prediction`. `title`: what they add up to.
    """

    rows: tuple[tuple[str, str, float, float, str], ...]
    rest: tuple[int, float]
    base: float
    prediction: float
    title: str


def contributions(graph: OpGraph, attribution: Attribution, *, plan: str, metric: str, method: str, count: int = 15) -> Contributions:
    """The `count` layers that add most, step bins added up."""
    frame = attribution.select(plan=plan, method=method, kind="layer", metric=metric)
    sums = frame.groupby("name", sort=False).agg({"value": "sum", "error": lambda e: math.sqrt(float((e**2).sum(skipna=False))), "choice": "first"})
    sums = sums.sort_values("value", ascending=False, kind="stable")
    shown, hidden = sums.iloc[:count], sums.iloc[count:]
    rows = tuple((str(name), str(x.choice), float(x.value), float(x.error), family(graph.layer(str(name)).role)) for name, x in shown.iterrows())
    base, prediction = float(frame["base"].iloc[0]), float(frame["prediction"].iloc[0])
    return Contributions(rows, (len(hidden), float(hidden["value"].sum())), base, prediction, f"added to the predicted {metric} of {plan}")


def draw_contributions(data: Contributions, width: int = HALF) -> Figure:
    """A bar a layer coloured by the family of its role, its choice beside its name; the others together below."""
    return styled(lambda: _draw(data, width))


def _draw(data: Contributions, width: int) -> Figure:
    from matplotlib.patches import Patch

    count, rest = data.rest
    figure, ax = canvas(width, 90 + 17 * (len(data.rows) + (count > 0)))
    for i, (_, _, value, error, kind) in enumerate(data.rows):
        ax.barh(i, value, 0.74, color=FAMILY_COLOURS[kind])
        if math.isfinite(error):
            ax.errorbar(value, i, xerr=error, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    labels = [f"{_short(name)}  {choice}" for name, choice, *_ in data.rows]
    if count:
        ax.barh(len(data.rows), rest, 0.74, color=FAINT, edgecolor=QUIET, hatch="/////", linewidth=0.6)
        labels.append(f"the other {count} together")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.axvline(0, color=QUIET, linewidth=0.8)
    ax.set_xlabel(f"{data.title}\n({data.prediction:.3g} in all" + (f", {data.base:.3g} of it before any)" if data.base else ")"))
    ax.grid(axis="x", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4), useMathText=False)
    held = [name for name in FAMILIES if any(row[4] == name for row in data.rows)]
    figure.legend(
        [Patch(color=FAMILY_COLOURS[name]) for name in held], held, loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.2, borderpad=0
    )
    return figure


def _short(name: str, longest: int = 30) -> str:
    """The last whole words of a long name."""
    return name if len(name) <= longest else "…" + re.split(r"[._]", name[-longest:], maxsplit=1)[-1]
