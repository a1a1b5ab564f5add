"""What each feature, or each layer's choice, did to the predictions of many plans: a dot a plan,
spread where dots would hide each other.

Colour is the feature's own value among the plans (of a layer, the bits of its choice), so that a
row says in which direction more of it pushes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import QSearchError
from ..core.scheme import Scheme
from .style import HALF, INK, QUIET, canvas, scaled, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..core.attribution import Attribution

_BINS, _HEIGHT = (
    90,
    0.42,
)  # columns in which dots are stacked; how far from its row's middle a dot may stand
_REST = "the other {count} together"


@dataclass(frozen=True)
class Beeswarm:
    """`values`[row, plan]: what was added to the prediction; `offsets`: how far the dot stands from
    its row's middle, -0.42 to 0.42.

    `levels`[row, plan]: rank of the feature's own value among the plans, 0 (least) to 1 (most); NaN
    where it has none or never varies. Rows stand by their mean absolute value, the largest first;
    the last may hold the `rest` together. `title`: what is added to what; `colour`: what the levels
    are of.
    """

    rows: tuple[str, ...]
    values: NDArray[np.float64]
    offsets: NDArray[np.float64]
    levels: NDArray[np.float64]
    rest: bool
    title: str
    colour: str


def beeswarm(
    attribution: Attribution, *, metric: str, method: str, kind: str = "feature", count: int = 12
) -> Beeswarm:
    """The `count` names that move the predictions of all plans most, and the rest in one row.
    Raises `QSearchError` for fewer than two plans.
    """
    frame: Any = attribution.select(method=method, kind=kind, metric=metric)
    plans = list(dict.fromkeys(frame["plan"]))
    if len(plans) < 2:
        raise QSearchError(
            f"a beeswarm shows many plans; {method} explains only {plans[0]}, whose "
            "contributions are bars"
        )
    if kind == "layer":
        frame = frame.assign(
            data=[
                float(Scheme.parse(choice).bits) if choice else np.nan for choice in frame["choice"]
            ]
        )
    table = frame.pivot_table(
        index="name", columns="plan", values="value", aggfunc="sum", fill_value=0.0, sort=False
    )[plans]
    data = frame.pivot_table(
        index="name", columns="plan", values="data", aggfunc="mean", dropna=False, sort=False
    ).reindex(index=table.index, columns=plans)
    order = table.abs().mean(axis=1).sort_values(ascending=False, kind="stable").index
    shown, hidden = list(order[:count]), list(order[count:])
    values = [table.loc[name].to_numpy(dtype=np.float64) for name in shown]
    levels = [_ranks(data.loc[name].to_numpy(dtype=np.float64)) for name in shown]
    if hidden:
        values.append(table.loc[hidden].sum(axis=0).to_numpy(dtype=np.float64))
        levels.append(np.full(len(plans), np.nan))
        shown.append(_REST.format(count=len(hidden)))
    cells = np.array(values)
    low, high = float(cells.min()), float(cells.max())
    offsets = np.array([_spread(row, low, high) for row in cells])
    return Beeswarm(
        tuple(map(str, shown)),
        cells,
        offsets,
        np.array(levels),
        bool(hidden),
        f"added to the predicted {metric}",
        "bits of the choice" if kind == "layer" else "the feature's own value",
    )


def _ranks(data: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0 to 1, equal values sharing theirs; NaN where a value is missing or all are
    equal.
    """
    known = np.isfinite(data)
    if not known.any() or np.ptp(data[known]) == 0:
        return np.full(len(data), np.nan)
    ordered = np.sort(data[known])
    middle = (
        np.searchsorted(ordered, data, "left") + np.searchsorted(ordered, data, "right") - 1
    ) / 2
    return np.where(known, middle / (len(ordered) - 1), np.nan)


def _spread(row: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Dots of one column side by side around the middle; the fullest column of the row fills its
    height, or a dot a step where there are few.
    """
    column = np.minimum((row - low) / ((high - low) or 1.0) * _BINS, _BINS - 1).astype(int)
    place = np.zeros(len(row))
    for which in np.unique(column):
        held = np.flatnonzero(column == which)
        place[held] = np.arange(len(held)) - (len(held) - 1) / 2
    return place * min(0.12, _HEIGHT / max(float(np.abs(place).max()), 1e-9))


def draw_beeswarm(data: Beeswarm, width: int = HALF) -> Figure:
    """Rows of dots around zero, dark for little and light for much of the feature; grey where it
    has no value of its own.
    """
    return styled(lambda: _draw(data, width))


def _draw(data: Beeswarm, width: int) -> Figure:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    figure, ax = canvas(width, 70 + 24 * len(data.rows))
    scale = colormaps["cividis"]
    ax.axvline(0, color=QUIET, linewidth=0.8)
    for row, (values, offsets, levels) in enumerate(
        zip(data.values, data.offsets, data.levels, strict=True)
    ):
        colours: list[Any] = [QUIET if np.isnan(level) else scale(float(level)) for level in levels]
        ax.scatter(values, row + offsets, s=9, c=colours, edgecolors=INK, linewidths=0.2)
    ax.set_yticks(range(len(data.rows)), [shortened(name, 34) for name in data.rows])
    if data.rest:
        ax.get_yticklabels()[-1].set_color(QUIET)
    ax.set_ylim(len(data.rows) - 0.5, -0.5)
    scaled(ax, data.title)
    ax.grid(axis="y", linewidth=0.4)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    if not np.isnan(data.levels).all():
        bar = figure.colorbar(ScalarMappable(cmap=scale), ax=ax, pad=0.01, aspect=25, fraction=0.03)
        bar.set_ticks([0, 1], labels=["least", "most"])
        bar.set_label(data.colour, labelpad=0)
        bar.outline.set_visible(False)
    return figure
