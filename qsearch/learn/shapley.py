"""Exact Shapley values of the probes' quadratic model, in closed form: what each layer's choice
adds to the predicted error of a plan.

The model says that a plan's error is v(S) = E[(B + sum of d_i over S)^2] over probes, where layer i
moves a probe by d_i when it changes from the baseline's choice to the plan's, and B is what the
baseline itself does. Such a game has products of at most two players, so each product is shared
equally between its two: with D the sum of all d_i, the Shapley value of i is E[d_i (2B + D)], and
the values add up to v(all) - v(none) = E[(B + D)^2] - E[B^2]. No sampling of coalitions, no error
but that of the probes. Products of different layers, which a few dozen probes leave noisy, count as
far as they can be trusted (`trust`, t): v(S) = (1 - t) sum of E[s_l^2] + t E[(sum of s_l)^2] over
the layers' choices l in S, whose values are mixed in the same way. (Shapley 1953; pairs: the
Shapley interaction index of Grabisch and Roubens 1999, whose orders above two are zero here.)
Within a trajectory d_i is a sum over sampler steps, and its value splits over them the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..core.attribution import Attribution
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.interactions import table_shrinkage_weight
from ..core.plan import Plan
from ..core.probe_responses import Array, Cell, ProbeResponses, ratio
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable

METHOD = "shapley"


def explain_quadratic(
    graph: OpGraph,
    table: SensitivityTable,
    plans: Mapping[str, Plan],
    *,
    metrics: Iterable[str] | None = None,
    baseline: Plan | None = None,
    pairs: int = 0,
    trust: float | None = None,
) -> Attribution:
    """Shapley values of every layer that differs from `baseline` (full precision), per plan, metric
    of the table and step; noise powers or squared distances.

    `pairs`: so many of the strongest pairs of layers besides, with each layer's own error as the
    pair of itself with itself and the other pairs in one row, `(rest)`. `trust`: how much products
    between layers count, from 0 to 1; by default what the probes' own noise allows
    (`core.interactions.shrinkage_weight`). Raises `QSearchError` for a table without probe
    responses, of another graph, or that lacks a choice.
    """
    table.check(graph)
    if table.responses is None:
        raise QSearchError(
            "Shapley values need the responses that probes leave in a table; this one was "
            f"made by {table.frame['estimator'].iloc[0]}: profile with probe"
        )
    rows: list[dict[str, Any]] = []
    moves = _Moves(table.responses)
    for metric in metrics if metrics is not None else moves.metrics:
        cells = moves.cells(metric)
        share = table_shrinkage_weight(moves.responses, metric) if trust is None else trust
        for name, plan in plans.items():
            rows += [
                row | {"metric": metric}
                for row in _of_plan(moves, cells, name, plan, baseline, pairs, share)
            ]
    if not rows:
        raise QSearchError("every plan keeps what the baseline has; there is nothing to explain")
    return Attribution.from_rows(graph.id, rows)


class _Moves:
    """What choices add to each probe, by name; parts that a profile which ran out of time never
    came to are left out.
    """

    def __init__(self, responses: ProbeResponses) -> None:
        seen = {cell: ~np.isnan(values).all((0, 1, 2)) for cell, values in responses.values.items()}
        some = [cell for cell in seen if seen[cell].any()]
        self.responses = ProbeResponses(
            responses.choices,
            {c: responses.values[c][..., seen[c]] for c in some},
            {c: responses.power[c][seen[c]] for c in some},
        )
        self._places = {choice: i for i, choice in enumerate(responses.choices)}

    @property
    def metrics(self) -> list[str]:
        """The metrics of which probes left something."""
        return sorted({metric for metric, _ in self.responses.values})

    def cells(self, metric: str) -> list[Cell]:
        """The metric's cells. Raises `QSearchError` where there are none."""
        found = sorted(cell for cell in self.responses.values if cell[0] == metric)
        if not found:
            raise QSearchError(
                f"the table has no probe responses for {metric!r}; it has "
                f"{', '.join(sorted({m for m, _ in self.responses.values}))}"
            )
        return found

    def of_plan(self, cell: Cell, site: str, plan: Plan | None, bins: int) -> Array:
        """What a plan's choice of a site adds in each sampler step, by the range that the step (or
        the cell's bin) lies in.
        """
        if plan is None:
            return self.of(cell, site, KEEP)
        held = plan.choices.get(site, (KEEP,))
        if len(held) == 1:
            return self.of(cell, site, held[0])
        if bins > 1:
            return self.of(cell, site, held[plan.steps.of(2 * cell[1] + 1, 2 * bins)])
        length = self.responses.values[cell].shape[1]
        parts = [self.of(cell, site, scheme) for scheme in held]
        return np.stack([parts[plan.steps.of(t, length)][t] for t in range(length)])

    def of(self, cell: Cell, site: str, scheme: Scheme) -> Array:
        """[sampler steps, probes, parts]; nothing where the layer is kept."""
        values = self.responses.values[cell]
        if scheme == KEEP:
            return np.zeros(values.shape[1:])
        if (site, str(scheme)) not in self._places:
            raise QSearchError(f"the table has no {scheme} for {site}; profile with this scheme")
        return np.asarray(values[self._places[site, str(scheme)]], np.float64)


def _of_plan(
    known: _Moves,
    cells: list[Cell],
    name: str,
    plan: Plan,
    baseline: Plan | None,
    pairs: int,
    trust: float,
) -> list[dict[str, Any]]:
    responses = known.responses
    sites = list(dict.fromkeys([*plan.choices, *(baseline.choices if baseline else ())]))
    moved = [site for site in sites if _differs(plan, baseline, site)]
    bins = 1 + max(cell[1] for cell in cells)
    found, prediction, base = [], 0.0, 0.0
    products = np.zeros((len(moved), len(moved)))
    for cell in cells:
        power, nothing = responses.power[cell], np.zeros(responses.values[cell].shape[1:])
        here, there = (
            [known.of_plan(cell, site, which, bins) for site in sites] for which in (baseline, plan)
        )
        begin, end = sum(here, nothing).sum(0), sum(there, nothing).sum(0)
        base += _shrunk(begin, here, power, trust) / len(cells)
        prediction += _shrunk(end, there, power, trust) / len(cells)
        both = [
            pair
            for site, pair in zip(sites, zip(here, there, strict=True), strict=True)
            if site in moved
        ]
        moves = [after - before for before, after in both]
        own = [after * after.sum(0) - before * before.sum(0) for before, after in both]
        for site, move, alone in zip(moved, moves, own, strict=True):
            for step, part in enumerate(move):
                value, error = ratio(
                    trust * part * (begin + end) + (1 - trust) * alone[step], power
                )
                row = {
                    "kind": "layer",
                    "step": step if len(move) > 1 else cell[1],
                    "name": site,
                    "choice": plan.text(site),
                }
                found.append(row | {"value": value / len(cells), "error": error / len(cells)})
        if pairs and moved:
            products += trust * _products(np.stack(moves).sum(1), begin, power) / len(cells)
            products += (
                (1 - trust) * np.diag([ratio(alone.sum(0), power)[0] for alone in own]) / len(cells)
            )
    if pairs and moved:
        found += _strongest(plan, moved, products, pairs)
    whole = {"plan": name, "method": METHOD, "base": base, "prediction": prediction}
    return [row | whole for row in found]


def _differs(plan: Plan, baseline: Plan | None, site: str) -> bool:
    own = plan.choices.get(site, (KEEP,))
    other = (KEEP,) if baseline is None else baseline.choices.get(site, (KEEP,))
    alike = baseline is None or len(own) == 1 or plan.steps == baseline.steps
    return own != other or not alike


def _shrunk(total: Array, scores: list[Array], power: Array, trust: float) -> float:
    """The error of choices whose scores add up to `total` [probes, parts], with so much of their
    products.
    """
    return trust * ratio(total**2, power)[0] + (1 - trust) * sum(
        ratio(s.sum(0) ** 2, power)[0] for s in scores
    )


def _products(moves: Array, begin: Array, power: Array) -> Array:
    """[layers, layers]: off the diagonal E[2 d_i d_j] in its upper half, on it E[d_i (2B + d_i)];
    together E[(B + D)^2] - E[B^2].
    """
    seen = ~np.isnan(moves).all((0, 1))
    flat, scale = moves[:, :, seen], power[seen].sum()
    count = (~np.isnan(flat)).sum(1, keepdims=True)
    even = np.nan_to_num(flat / np.sqrt(count)).reshape(len(moves), -1)
    made = even @ even.T
    own = np.diag(made) + 2 * even @ np.nan_to_num(begin[:, seen] / np.sqrt(count[0])).ravel()
    return np.asarray((np.triu(2 * made, 1) + np.diag(own)) / scale)


def _strongest(plan: Plan, moved: list[str], products: Array, pairs: int) -> list[dict[str, Any]]:
    rows = [
        {
            "kind": "pair",
            "name": a,
            "other": a,
            "choice": plan.text(a),
            "value": products[i, i],
        }
        for i, a in enumerate(moved)
    ]
    upper = np.triu_indices(len(moved), 1)
    order = np.argsort(-np.abs(products[upper]))
    for k in order[:pairs]:
        i, j = int(upper[0][k]), int(upper[1][k])
        rows.append(
            {
                "kind": "pair",
                "name": moved[i],
                "other": moved[j],
                "choice": f"{plan.text(moved[i])} {plan.text(moved[j])}",
                "value": products[i, j],
            }
        )
    return [
        *rows,
        {
            "kind": "pair",
            "name": "(rest)",
            "other": "(rest)",
            "value": float(products[upper][order[pairs:]].sum()),
        },
    ]
