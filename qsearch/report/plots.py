"""What plots show: bits and noise layer by layer, size against quality, as plain data.

What computes stands here, without matplotlib; `drawing.py` draws it and computes nothing. So a
number in a plot can be tested, and the page can say it in words as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.attentions import PART
from ..core.cost import stored_bits
from ..core.errors import QSearchError, nearest
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..core.table import SensitivityTable

FULL_PRECISION = "full precision"
#: families of roles, in which a plan's layers are coloured: as many as can be distinguished, the
#: names say the rest
FAMILIES = (
    "self-attention",
    "cross-attention",
    "feed-forward",
    "conditioning",
    "convolution",
    "input and output",
    "linear",
)


def family(role: str) -> str:
    """The one of `FAMILIES` that a role belongs to."""
    found = next((name for name in FAMILIES[:3] if role.startswith(name)), "")
    if found:
        return found
    if "embedding" in role or role == "modulation":
        return "conditioning"
    if role in ("input", "output"):
        return "input and output"
    return "convolution" if role in ("skip", "shortcut", "resample") or "conv" in role else "linear"


class Span(NamedTuple):
    """Neighbouring layers of one block: [start, stop)."""

    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class LayerAxis:
    """Layers in order of execution as an axis: full `names`, short `labels`, `spans` of blocks, and
    `key`, what the spans' labels stand for.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    spans: tuple[Span, ...]
    key: str


def layer_axis(layers: Sequence[LayerSpec], *, longest: int = 24) -> LayerAxis:
    """Axis for `layers`. A label is the name within its block; of one longer than `longest`
    letters, the last whole words.
    """
    names = tuple(layer.name for layer in layers)
    local = [layer.name.removeprefix(f"{layer.block}.") for layer in layers]
    labels = tuple(
        name if len(name) <= longest else "…" + (re.split(r"[._]", name[-longest:], maxsplit=1)[-1])
        for name in local
    )
    words = list(
        dict.fromkeys(
            w for layer in layers for w in layer.block.split(".") if w and not w.isdigit()
        )
    )
    short = (
        {w: _abbreviation(w, words) for w in words} if len(words) > 1 else dict.fromkeys(words, "")
    )
    spans, start = [], 0
    for block, held in groupby(layers, key=lambda layer: layer.block):
        stop = start + len(list(held))
        parts = [short.get(p, p) for p in block.split(".")]
        label = "".join(
            ("." if p and not p.isdigit() and i else "") + p for i, p in enumerate(parts)
        )
        spans += [Span(label, start, stop)] if block else []
        start = stop
    key = (
        ", ".join(f"{short[w]} = {w}" for w in words)
        if len(words) > 1
        else "".join(f"numbers are {w}" for w in words)
    )
    return LayerAxis(names, labels, tuple(spans), key)


def short_names(layers: Sequence[LayerSpec]) -> tuple[dict[str, str], str]:
    """Layer -> a short name that no other has, its block abbreviated as on an axis, and the key to
    the abbreviations.
    """
    axis = layer_axis(layers)
    block = {axis.names[i]: span.label for span in axis.spans for i in range(span.start, span.stop)}
    named = {
        name: f"{block[name]} {label}" if block.get(name) else label
        for name, label in zip(axis.names, axis.labels, strict=True)
    }
    short = list(named.values())
    return {
        name: words if short.count(words) == 1 else name for name, words in named.items()
    }, axis.key


def _abbreviation(word: str, words: Sequence[str]) -> str:
    for n in range(1, len(word)):
        if not any(other != word and other.startswith(word[:n]) for other in words):
            return word[:n]
    return word


@dataclass(frozen=True)
class LayerBits:
    """Stored bits a weight of every layer, scales included; `codes`: bits of one code; `limit`: the
    budget's average, None where it sets none.
    """

    axis: LayerAxis
    stored: tuple[float, ...]
    codes: tuple[int, ...]
    families: tuple[str, ...]
    average: float
    limit: float | None


def layer_bits(graph: OpGraph, plan: Plan) -> LayerBits:
    """What `plan` stores, layer by layer."""
    schemes = [plan.choices[layer.name][0] for layer in graph]
    stored = tuple(stored_bits(x, plan.choices[x.name]) / x.weights for x in graph)
    limit = plan.budget.average_bits if plan.budget else None
    families = tuple(family(layer.role) for layer in graph)
    return LayerBits(
        layer_axis(graph.layers),
        stored,
        tuple(s.bits for s in schemes),
        families,
        plan.achieved.average_bits,
        limit,
    )


@dataclass(frozen=True)
class LayerNoise:
    """Decibels [layer, column] of full precision above the noise of one choice; NaN = not measured,
    or at the measurement floor.

    `levels`: the colour scale's steps. `chosen`: column of the plan's scheme for each layer, -1
    where it is none of them.
    """

    axis: LayerAxis
    columns: tuple[str, ...]
    column_title: str
    decibels: NDArray[np.float64]
    levels: tuple[float, ...]
    chosen: tuple[int, ...]


def decibels(noise: float) -> float:
    """-10 log10 of a noise power; NaN for one that is not above zero."""
    return -10 * math.log10(noise) if noise > 0 else math.nan


class Loss(NamedTuple):
    """What one choice at one layer costs: estimate, standard error, and the floor below twice which
    the estimate means nothing.
    """

    estimate: float
    error: float
    floor: float

    @property
    def at_floor(self) -> bool:
        """Within 3 dB of the floor: the measurement's noise, not the choice's
        (SensitivityTable.at_floor).
        """
        return self.estimate < 2 * self.floor


def losses(
    table: SensitivityTable, scheme: Scheme | str, *, metric: str = "noise"
) -> dict[str, Loss]:
    """site -> its loss at one scheme, averaged over the step bins."""
    rows = _rows(table, metric)
    check_scheme(rows, scheme)
    rows = rows[rows["scheme"] == str(scheme)]
    squared = rows.assign(error=rows["error"] ** 2).groupby("site", sort=False)
    means, errors, counts = (
        squared[["estimate", "floor"]].mean(),
        squared["error"].sum(),
        squared.size(),
    )
    return {
        str(s): Loss(float(m.estimate), math.sqrt(errors[s]) / int(counts[s]), float(m.floor))
        for s, m in means.iterrows()
    }


def check_scheme(rows: Any, scheme: Scheme | str) -> None:
    """Raises `QSearchError` with the nearest scheme where the rows of a table have none of that
    name.
    """
    known = sorted(rows["scheme"].unique())
    if str(scheme) not in known:
        raise QSearchError(f"the table has no scheme {str(scheme)!r}{nearest(str(scheme), known)}")


def by_size(graph: OpGraph, schemes: Iterable[str]) -> tuple[str, ...]:
    """Schemes of layers, those that store the graph in fewer bits first."""
    return tuple(
        sorted(
            (s for s in schemes if not Scheme.parse(s).attention),
            key=lambda s: (
                Plan.uniform(graph, s).achieved.bits,
                s,
            ),
        )
    )


def noise_by_scheme(
    graph: OpGraph, table: SensitivityTable, plan: Plan | None = None, *, metric: str = "noise"
) -> LayerNoise:
    """Noise of every layer at every scheme, averaged over the step bins; `plan` marks what it
    chose.
    """
    rows = _rows(table, metric)
    rows = rows[~rows["site"].str.endswith(f":{PART}")]
    columns = by_size(graph, rows["scheme"].unique())
    chosen = (
        {}
        if plan is None
        else {
            name: columns.index(plan.text(name))
            for name in plan.choices
            if plan.text(name) in columns
        }
    )
    return _layer_noise(graph, rows, "scheme", columns, columns, "scheme", chosen)


def noise_by_step(
    graph: OpGraph, table: SensitivityTable, scheme: Scheme | str, *, metric: str = "noise"
) -> LayerNoise:
    """Noise of every layer at one scheme in every step bin, the noisiest bin first."""
    rows = _rows(table, metric)
    check_scheme(rows, scheme)
    steps = sorted(int(s) for s in rows["step"].unique())
    return _layer_noise(
        graph,
        rows[rows["scheme"] == str(scheme)],
        "step",
        steps,
        tuple(_bin_name(i, len(steps)) for i in range(len(steps))),
        "step bin",
        {},
    )


def _rows(table: SensitivityTable, metric: str) -> Any:
    table.values(metric)  # names the nearest metric when there is none of that name
    return table.frame[table.frame["metric"] == metric]


def _bin_name(i: int, count: int) -> str:
    return (
        {0: f"{i + 1}, noisiest", count - 1: f"{i + 1}, cleanest"}.get(i, f"{i + 1}")
        if count > 1
        else "all"
    )


def _layer_noise(
    graph: OpGraph,
    rows: Any,
    by: str,
    keys: Sequence[Any],
    columns: tuple[str, ...],
    title: str,
    chosen: Mapping[str, int],
) -> LayerNoise:
    means = rows.groupby(["site", by], as_index=False)[["estimate", "floor"]].mean()
    # Within 3 dB of the floor a number is the measurement's, not the choice's
    # (SensitivityTable.at_floor).
    found = {(s, k): decibels(v) for s, k, v, f in means.itertuples(index=False) if v >= 2 * f}
    layers = [layer for layer in graph.layers if layer.quantizable]
    cells = np.array(
        [[found.get((layer.name, key), math.nan) for key in keys] for layer in layers],
        dtype=np.float64,
    )
    return LayerNoise(
        layer_axis(layers),
        columns,
        title,
        cells,
        colour_levels(cells.ravel()),
        tuple(chosen.get(layer.name, -1) for layer in layers),
    )


def colour_levels(cells: Iterable[float]) -> tuple[float, ...]:
    """Round borders for at most ten colours that hold every finite cell."""
    finite = [float(x) for x in cells if math.isfinite(x)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 10.0)
    step = next(
        (s for s in (1, 2, 5, 10, 20, 50) if math.floor(high / s) - math.floor(low / s) < 10), 100
    )
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return tuple(float(step * i) for i in range(first, last + 1))


@dataclass(frozen=True)
class SizeQuality:
    """Measured plans: `kilobytes` stored (1000 bytes) and a metric's mean and standard error.
    `title`: the metric with its unit.
    """

    plans: tuple[str, ...]
    kilobytes: tuple[float, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...]
    title: str


def size_quality(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str = "sqnr",
    title: str = "SQNR of the final latent, dB",
) -> SizeQuality:
    """Rows of a run's results as points. Full precision is left out: compared with itself its ratio
    is infinite.
    """
    shown = [row for row in rows if row["plan"] != FULL_PRECISION and metric in row["metrics"]]
    means, errors = (
        zip(
            *((float(m), float(e)) for m, e in (row["metrics"][metric] for row in shown)),
            strict=True,
        )
        if shown
        else ((), ())
    )
    return SizeQuality(
        tuple(str(r["plan"]) for r in shown),
        tuple(r["bytes"] / 1000 for r in shown),
        means,
        errors,
        title,
    )
