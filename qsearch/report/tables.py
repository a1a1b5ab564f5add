"""The page's tables as plain data: results, bits by role, and why the most sensitive layers got
what they got.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..core.cost import stored_bits
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from .plots import FULL_PRECISION, by_size, decibels
from .text import cell

#: standard errors by which a plan must be better to be called so
_SURE = 2.0


@dataclass(frozen=True)
class Column:
    """A metric of the results: its `title`, and whether more is better (None: not declared)."""

    metric: str
    title: str
    up: bool | None


@dataclass(frozen=True)
class ResultRow:
    """A measured plan. `cells`: (mean ± standard error, whether it is surely the best of the
    quantized plans) for each column.
    """

    plan: str
    average_bits: float
    kilobytes: float
    cells: tuple[tuple[str, bool], ...]


def results(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[Column, ...], tuple[ResultRow, ...]]:
    """Every metric of every measured plan. The best is sought among all but full precision, which
    is what they are compared with.
    """
    metrics = dict.fromkeys(str(m) for row in rows for m in row["metrics"])
    names = sorted(metrics, key=lambda m: (m == "noise", m != "output_sqnr"))  # the output first
    words = {name: metric_words(name) for name in names}
    columns = tuple(Column(m, words[m].long, words[m].higher_is_better) for m in names)
    best = {c.metric: _best(rows, c) for c in columns}
    return columns, tuple(
        ResultRow(
            str(row["plan"]),
            float(row["average_bits"]),
            row["bytes"] / 1000,
            tuple(
                (
                    _cell(row, c.metric),
                    row["plan"] == best[c.metric],
                )
                for c in columns
            ),
        )
        for row in rows
    )


def _mean(row: Mapping[str, Any], metric: str) -> float | None:
    return float(row["metrics"][metric][0]) if metric in row["metrics"] else None


def _best(rows: Sequence[Mapping[str, Any]], column: Column) -> str:
    """The plan that is better than every other quantized one by more than `_SURE` standard errors
    of their difference; "" where none is.
    """
    able = [
        row
        for row in rows
        if row["plan"] != FULL_PRECISION and _mean(row, column.metric) is not None
    ]
    if column.up is None or len(able) < 2:
        return ""  # alone, or with no order, none is the best
    able.sort(key=lambda row: _mean(row, column.metric) or 0.0, reverse=column.up)
    for other in able[1:]:
        gap, error = difference(able[0], other, column.metric)
        if abs(gap) <= _SURE * error:
            return ""
    return str(able[0]["plan"])


def difference(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Mean of a metric's difference between two plans and its standard error: of the samples' own
    differences where both have them.
    """
    one, two = (row.get("samples", {}).get(metric, ()) for row in (a, b))
    if len(one) == len(two) > 1:
        gaps = [x - y for x, y in zip(one, two, strict=True)]
        mean = sum(gaps) / len(gaps)
        spread = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
        return mean, math.sqrt(spread / len(gaps))
    (m1, e1), (m2, e2) = a["metrics"][metric], b["metrics"][metric]
    return m1 - m2, math.hypot(e1, e2)


def _cell(row: Mapping[str, Any], metric: str) -> str:
    if metric == "noise" and metric in row["metrics"]:
        mean, error = row["metrics"][metric]
        return "0" if mean == error == 0 else f"{mean:.2e} ± {error:.0e}"
    return (
        cell(dict(row), metric).replace("-", "–")
        if metric not in row["metrics"]
        else cell(dict(row), metric)
    )


@dataclass(frozen=True)
class RoleBits:
    """Layers of one role under a plan. `share`: of all weights; `sqnr`: median over the layers of
    the decibels at the scheme asked for.
    """

    role: str
    layers: int
    share: float
    average_bits: float
    schemes: tuple[tuple[str, int], ...]
    sqnr: float


def bits_by_role(
    graph: OpGraph, table: SensitivityTable, plan: Plan, scheme: str, *, metric: str = "noise"
) -> tuple[RoleBits, ...]:
    """What each role got, the role with the most stored bits a weight first."""
    values = table.values(metric)
    held: dict[str, list[LayerSpec]] = {}
    for layer in graph:
        held.setdefault(layer.role, []).append(layer)
    found = []
    for role, layers in held.items():
        weights = sum(layer.weights for layer in layers)
        chosen = [plan.text(layer.name) for layer in layers]
        single = by_size(graph, {text for text in chosen if " | " not in text})
        counts = [
            (text, chosen.count(text))
            for text in (*single, *sorted({t for t in chosen if " | " in t}))
        ]
        noises = [
            values[layer.name][scheme] for layer in layers if scheme in values.get(layer.name, {})
        ]
        bits = sum(stored_bits(layer, plan.choices[layer.name]) for layer in layers)
        found.append(
            RoleBits(
                role,
                len(layers),
                weights / graph.weights,
                bits / weights,
                tuple(counts),
                decibels(median(noises) if noises else 0.0),
            )
        )
    return tuple(sorted(found, key=lambda r: (-r.average_bits, r.role)))


def _bits(layer: LayerSpec, scheme: Scheme | str) -> int:
    return Scheme.parse(scheme).stored_bits(layer.weight_shape, layer.channel_axis, layer.parts)


@dataclass(frozen=True)
class Cheaper:
    """The next cheaper choice for a layer: the kilobytes it would save, and the plan's predicted
    decibels with it.
    """

    scheme: str
    saves: float
    sqnr: float


@dataclass(frozen=True)
class Reason:
    """Why a layer got its scheme. `share`: of all weights; `decibels`: scheme -> SQNR of the output
    with this layer alone (NaN: not measured).
    """

    layer: str
    role: str
    share: float
    scheme: str
    decibels: dict[str, float]
    cheaper: Cheaper | None


def predicted_noise(table: SensitivityTable, plan: Plan, *, metric: str = "noise") -> float:
    """Noise of the whole plan by the table: the sum over its sites, as noise powers add up. NaN
    where a site's scheme was not measured.
    """
    try:
        return table.predict(plan, metric, interactions=False)[0]
    except QSearchError:
        return math.nan


def reasons(
    graph: OpGraph,
    table: SensitivityTable,
    plan: Plan,
    *,
    count: int = 10,
    metric: str = "noise",
) -> tuple[Reason, ...]:
    """The most sensitive layers: those whose cheapest choice makes the most noise for each bit it
    stores.
    """
    values = table.values(metric)
    total = predicted_noise(table, plan, metric=metric)
    schemes = by_size(graph, {s for found in values.values() for s in found})
    measured = [layer for layer in graph.quantizable if layer.name in values]
    measured.sort(key=lambda layer: (-_sensitivity(layer, values[layer.name]), layer.name))
    return tuple(
        Reason(
            layer.name,
            layer.role,
            layer.weights / graph.weights,
            plan.text(layer.name),
            {s: decibels(values[layer.name].get(s, 0.0)) for s in schemes},
            None
            if len(plan.choices[layer.name]) > 1
            else _next_cheaper(layer, values[layer.name], plan.choices[layer.name][0], total),
        )
        for layer in measured[:count]
    )


def _by_price(layer: LayerSpec, values: Mapping[str, float]) -> list[str]:
    return sorted(values, key=lambda s: (_bits(layer, s), s))


def _sensitivity(layer: LayerSpec, values: Mapping[str, float]) -> float:
    cheapest = _by_price(layer, values)[0]
    return values[cheapest] / _bits(layer, cheapest)


def _next_cheaper(
    layer: LayerSpec, values: Mapping[str, float], chosen: Scheme, total: float
) -> Cheaper | None:
    below = [s for s in _by_price(layer, values) if _bits(layer, s) < _bits(layer, chosen)]
    if not below:
        return None
    now = 0.0 if chosen == KEEP else values.get(str(chosen), math.nan)
    return Cheaper(
        below[-1],
        (_bits(layer, chosen) - _bits(layer, below[-1])) / 8000,
        decibels(total - now + values[below[-1]]),
    )
