"""explain(graph, plans, ...) -> Attribution: why a plan is predicted to be good or bad, by every
explainer that what is given allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.attribution import Attribution
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .nodes import Skeleton, prices_of
from .options import PAIRS
from .shapley import explain_quadratic
from .surrogate import Surrogate


def explain(
    graph: OpGraph,
    plans: Mapping[str, Plan],
    *,
    tables: Sequence[SensitivityTable] | SensitivityTable = (),
    surrogates: Sequence[Surrogate] = (),
    baseline: Plan | None = None,
    pairs: int = PAIRS,
    layers: bool = True,
) -> Attribution:
    """Values for each of `plans`: of layers, by step and metric, and of pairs of layers, from
    tables with probe responses; of features, from surrogates.

    A graph predictor among the surrogates scores operations and blocks instead, of a uniform plan
    of each scheme that it knows.

    Args:
        graph: the model's graph.
        plans: name -> plan.
        tables: sensitivity tables of the graph.
        surrogates: fitted predictors; they compare with the plans that they learnt from.
        baseline: what a plan is compared with by the tables; full precision when left out.
        pairs: how many pairs of layers are kept, the largest first.
        layers: without them only surrogates are asked.

    Returns:
        Rows of `core.attribution.COLUMNS`.

    Raises:
        QSearchError: values and base do not add up to each prediction within
            `core.attribution.TOLERANCE` of the predictions' range.
    """
    known = (tables,) if isinstance(tables, SensitivityTable) else tuple(tables)
    parts = [
        explain_quadratic(graph, table, plans, baseline=baseline, pairs=pairs)
        for table in known
        if layers and table.responses is not None
    ]
    parts += [explain_surrogate(s, graph, plans, known) for s in surrogates]
    if not parts:
        raise QSearchError(
            "there is nothing to explain with; give a surrogate (`qsearch fit`), or a "
            "table that probes made (`qsearch profile --estimator probe`)"
        )
    return Attribution.together(parts)


def explain_surrogate(
    surrogate: Surrogate,
    graph: OpGraph,
    plans: Mapping[str, Plan],
    tables: Sequence[SensitivityTable] = (),
) -> Attribution:
    """What each column of features adds to a surrogate's prediction, on the scale on which it
    learns (`scores.linked`); of a graph predictor, its scores.
    """
    if not surrogate.has_columns:
        return _scores(surrogate, graph, tables)
    data = surrogate.data(graph, plans, tables)
    values, base = surrogate.model.shares(data)
    predicted = surrogate.model.predict(data)
    wide = len(surrogate.columns)
    columns = {
        "plan": np.repeat(list(plans), wide),
        "name": np.tile(surrogate.columns, len(plans)),
        "value": values.ravel(),
        "data": data.values.ravel(),
        "prediction": np.repeat(predicted, wide),
    }
    fixed = {"method": surrogate.kind, "kind": "feature", "metric": surrogate.metric, "base": base}
    return Attribution.from_columns(graph.id, columns | fixed)


def _scores(
    surrogate: Surrogate, graph: OpGraph, tables: Sequence[SensitivityTable]
) -> Attribution:
    skeleton, prices = Skeleton(graph), prices_of(tables)
    model: Any = surrogate.model
    sign = -1.0 if surrogate.lower_is_better else 1.0
    rows: list[dict[str, Any]] = []
    for scheme in surrogate.schemes:
        layers, blocks = model.scores(
            skeleton, skeleton.with_plan(Plan.uniform(graph, scheme), prices)
        )
        for kind, found in (("operation", layers), ("block", blocks)):
            whole = {
                "plan": f"uniform {scheme}",
                "method": surrogate.kind,
                "kind": kind,
                "metric": surrogate.metric,
                "choice": scheme,
            }
            rows += [
                whole | {"name": name, "value": sign * value, "base": 0.0, "prediction": math.nan}
                for name, value in found.items()
            ]
    return Attribution.from_rows(graph.id, rows)
