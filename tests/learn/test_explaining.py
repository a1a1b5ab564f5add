"""explain: values add up, Shapley values are those of brute force, and an explainer that does not
add up is caught.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsearch.core.attribution import TOLERANCE, Attribution
from qsearch.core.errors import QSearchError
from qsearch.core.interactions import scores_of, shrinkage_weight
from qsearch.core.plan import Plan
from qsearch.core.probe_responses import ProbeResponses
from qsearch.core.table import SensitivityTable
from qsearch.learn.contracts import small_graph, small_plans, small_study, small_table
from qsearch.learn.explaining import explain
from qsearch.learn.fitting import Study, fit
from qsearch.learn.shapley import explain_quadratic
from qsearch.learn.surrogates import ridge

GRAPH = small_graph(blocks=1)  # six layers: 64 coalitions
PLAN = Plan.make(
    GRAPH,
    dict(
        zip(
            [x.name for x in GRAPH],
            ("uint2-c", "km2-c", "uint3-c", "uint4-c", "keep", "uint2-c"),
            strict=True,
        )
    ),
)


def brute(table: SensitivityTable, plan: Plan, base: Plan, trust: float) -> dict[str, float]:
    """Shapley values by their definition: what a layer adds, averaged over all orders in which
    layers can change.
    """
    names = [layer.name for layer in GRAPH]

    def worth(changed: frozenset[str]) -> float:
        chosen = {n: (plan if n in changed else base).layers[n] for n in names}
        return (
            trust * table.predict(chosen)[0]
            + (1 - trust) * table.predict(chosen, interactions=False)[0]
        )

    known = {
        frozenset(s): worth(frozenset(s))
        for k in range(len(names) + 1)
        for s in itertools.combinations(names, k)
    }
    out = {}
    for name in names:
        rest = [n for n in names if n != name]
        out[name] = sum(
            math.factorial(k)
            * math.factorial(len(rest) - k)
            / math.factorial(len(names))
            * (known[frozenset({*s, name})] - known[frozenset(s)])
            for k in range(len(rest) + 1)
            for s in itertools.combinations(rest, k)
        )
    return out


@pytest.mark.parametrize("trust", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("baseline", ["keep", "uint4-c"])
def test_the_closed_form_equals_shapley_values_by_definition(baseline: str, trust: float) -> None:
    table, base = small_table(GRAPH), Plan.uniform(GRAPH, baseline)

    found = explain_quadratic(GRAPH, table, {"p": PLAN}, baseline=base, trust=trust)

    totals = found.totals(plan="p", method="shapley", kind="layer", metric="noise")
    expected = {
        k: v for k, v in brute(table, PLAN, base, trust).items() if PLAN.layers[k] != base.layers[k]
    }
    assert totals == pytest.approx(expected, rel=1e-9)
    for column, plan in (("base", base), ("prediction", PLAN)):
        summed, whole = (table.predict(plan, interactions=i)[0] for i in (False, True))
        assert found.frame[column].iloc[0] == pytest.approx(trust * whole + (1 - trust) * summed)


def test_products_count_as_far_as_the_probes_can_be_trusted() -> None:
    table = small_table(GRAPH)
    scores = scores_of(table.responses, {"noise": 1.0})  # type: ignore[arg-type]  # probes made it
    trust = shrinkage_weight(
        np.stack([np.stack(list(row.values()), 1) for row in scores.values()], 1)
    )

    found, said = (explain_quadratic(GRAPH, table, {"p": PLAN}, trust=t) for t in (None, trust))

    assert 0 <= trust < 1
    assert found.frame["prediction"].iloc[0] == pytest.approx(said.frame["prediction"].iloc[0])


def test_a_metric_without_shares_is_told() -> None:
    with pytest.raises(
        QSearchError, match="the table has no probe responses for 'scored'; it has noise"
    ):
        explain_quadratic(GRAPH, small_table(GRAPH), {"p": PLAN}, metrics=["scored"])


def test_values_split_over_step_bins() -> None:
    table = small_table(GRAPH)

    frame = explain_quadratic(GRAPH, table, {"p": PLAN}, trust=1.0).frame

    for step in (0, 1):
        assert frame.loc[frame["step"] == step, "value"].sum() == pytest.approx(
            table.predict(PLAN, steps=[step])[0] / 2
        )


def test_parts_that_were_never_measured_explain_nothing() -> None:
    table = small_table(GRAPH)
    shares = table.responses
    assert shares is not None
    first, second = shares.values
    short = {
        first: shares.values[first].copy(),
        second: np.full_like(shares.values[second], np.nan),
    }
    short[first][..., -1] = np.nan
    power = {first: shares.power[first].copy(), second: np.full_like(shares.power[second], np.nan)}
    power[first][-1] = np.nan
    cut = ProbeResponses(
        shares.choices, {first: shares.values[first][..., :-1]}, {first: shares.power[first][:-1]}
    )

    values, expected = (
        explain_quadratic(GRAPH, replace(table, responses=s), {"p": PLAN}, pairs=3).totals(
            plan="p", method="shapley", kind="layer", metric="noise"
        )
        for s in (ProbeResponses(shares.choices, short, power), cut)
    )

    assert values == pytest.approx(expected)


def test_pairs_add_up_to_the_same_and_halves_of_them_make_the_values() -> None:
    table = small_table(GRAPH)

    found = explain_quadratic(GRAPH, table, {"p": PLAN}, pairs=100)

    pairs = found.select(kind="pair")
    own = {r["name"]: r["value"] for r in pairs.to_dict("records") if r["name"] == r["other"]}
    for r in pairs.to_dict("records"):
        if r["name"] != r["other"]:
            own[r["name"]] += r["value"] / 2
            own[r["other"]] += r["value"] / 2
    own.pop("(rest)")
    assert own == pytest.approx(
        found.totals(plan="p", method="shapley", kind="layer", metric="noise")
    )


def test_pairs_that_are_not_listed_stand_together() -> None:
    found = explain_quadratic(GRAPH, small_table(GRAPH), {"p": PLAN}, pairs=2).select(kind="pair")

    listed = found[(found["name"] != found["other"])]
    assert len(listed) == 2
    assert (found["name"] == "(rest)").sum() == 1


@pytest.mark.parametrize("kind", ["ridge", "xgboost"])
def test_values_of_many_plans_add_up_to_their_predictions(kind: str) -> None:
    study = small_study(30)
    surrogate = fit(study.graph, study.trials, study.tables, metric="sqnr", kind=kind, folds=2)
    plans = small_plans(study.graph, 200, seed=8)

    sums = explain(
        study.graph, plans, tables=study.tables, surrogates=[surrogate], layers=False
    ).sums()

    predicted = [y for y, _, _ in surrogate.predict(study.graph, plans, study.tables).values()]
    assert len(sums) == 200
    off = np.abs(sums["value"] + sums["base"] - predicted).max()
    assert off <= TOLERANCE * np.ptp(predicted)


def test_an_explainer_that_does_not_add_up_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study(30)
    surrogate = fit(study.graph, study.trials, study.tables, metric="sqnr", kind="ridge", folds=2)
    honest = ridge.Ridge.shares

    def shares(self: ridge.Ridge, data: Any) -> Any:
        values, base = honest(self, data)
        return values * (1 + 1e-4), base

    monkeypatch.setattr(ridge.Ridge, "shares", shares)

    with pytest.raises(
        QSearchError,
        match="values and base must add up to the prediction; those of ridge for sqnr of plan",
    ):
        explain(
            study.graph,
            small_plans(study.graph, 20),
            tables=study.tables,
            surrogates=[surrogate],
            layers=False,
        )


def test_a_graph_predictor_scores_every_layer_and_block_with_every_scheme() -> None:
    study = small_study(12)
    surrogate = fit(study.graph, study.trials, study.tables, metric="sqnr", kind="gnn", folds=2)

    found = explain(
        study.graph,
        small_plans(study.graph, 1),
        tables=study.tables,
        surrogates=[surrogate],
        layers=False,
    )

    assert len(found.select(kind="operation")) == len(study.graph.layers) * len(surrogate.schemes)
    assert len(found.select(kind="block")) == len(study.graph.blocks) * len(surrogate.schemes)
    assert np.isfinite(found.frame["value"]).all()


def test_a_table_without_probes_explains_nothing(study_without_shares: Study) -> None:
    with pytest.raises(QSearchError, match="there is nothing to explain with"):
        explain(
            study_without_shares.graph,
            study_without_shares.plans(),
            tables=study_without_shares.tables,
        )
    with pytest.raises(QSearchError, match="Shapley values need the responses that probes leave"):
        explain_quadratic(
            study_without_shares.graph, study_without_shares.tables[0], study_without_shares.plans()
        )


@pytest.fixture
def study_without_shares() -> Study:
    study = small_study(3)
    return replace(study, tables=(replace(study.tables[0], responses=None),))


def test_full_precision_has_nothing_to_explain() -> None:
    with pytest.raises(QSearchError, match="nothing to explain"):
        explain_quadratic(GRAPH, small_table(GRAPH), {"p": Plan.uniform(GRAPH, "keep")})


def test_an_attribution_comes_back_from_disk(tmp_path: Path) -> None:
    made = explain(GRAPH, {"p": PLAN}, tables=small_table(GRAPH))

    made.save(tmp_path / "attribution.parquet")

    assert Attribution.load(tmp_path / "attribution.parquet", GRAPH.id).frame.equals(made.frame)


def test_a_file_whose_values_were_changed_is_refused(tmp_path: Path) -> None:
    made = explain(GRAPH, {"p": PLAN}, tables=small_table(GRAPH))
    frame = made.frame.copy()
    broken = object.__new__(Attribution)
    frame.loc[0, "value"] += 1e-3
    object.__setattr__(broken, "graph", made.graph)
    object.__setattr__(broken, "frame", frame)
    broken.save(tmp_path / "attribution.parquet")

    with pytest.raises(QSearchError, match="must add up"):
        Attribution.load(tmp_path / "attribution.parquet")
