"""fit: held-out scores are honest, intervals hold what they promise, files come back, and what
can't be learnt from is refused with a word.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from scipy.stats import kendalltau, spearmanr

from qsearch.core import plugins
from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.plan import Plan
from qsearch.learn.contracts import small_graph, small_plans, small_study
from qsearch.learn.fitting import Study, _alike, by_graph, cross_validate, fit, training_set
from qsearch.learn.scores import half_width, linked, score, unlinked
from qsearch.learn.surrogate import Surrogate


@pytest.fixture(scope="module")
def study() -> Study:
    """Sixty measured plans."""
    return small_study(60)


@pytest.fixture(scope="module")
def fitted(study: Study) -> Surrogate:
    return fit(study.graph, study.trials, study.tables, metric="sqnr", kind="ridge")


def test_held_out_scores_come_near_those_of_new_plans(study: Study, fitted: Surrogate) -> None:
    new = small_study(60, seed=9)

    found = [y for y, _, _ in fitted.predict(new.graph, new.plans(), new.tables).values()]

    assert fitted.scores.spearman == pytest.approx(
        spearmanr(found, new.target("sqnr")).statistic, abs=0.05
    )
    assert fitted.scores.spearman > 0.9
    assert fitted.scores.plans == 60


def test_intervals_hold_as_many_new_plans_as_they_promise(fitted: Surrogate) -> None:
    new = small_study(200, seed=11)

    found = fitted.predict(new.graph, new.plans(), new.tables, coverage=0.8)

    inside = [
        low <= y <= high
        for (_, low, high), y in zip(found.values(), new.target("sqnr"), strict=True)
    ]
    assert 0.7 < np.mean(inside) < 0.95


def test_the_conformal_width_is_the_promised_order_statistic() -> None:
    residuals = np.array([0.1, -0.5, 0.2, 0.4, -0.3, 0.6, 0.7, -0.8, 0.9])

    assert half_width(residuals, 0.9) == 0.9  # the ninth of nine
    assert half_width(residuals, 0.5) == 0.5  # the fifth
    assert half_width(residuals, 0.95) == np.inf  # nine are too few


def test_plans_that_are_nearly_the_same_stay_on_one_side(study: Study) -> None:
    twin = replace(
        study.trials[0],
        name="twin",
        plan="another",
        choices={**study.trials[0].choices, "last": study.trials[1].choices["last"]},
    )

    taken = training_set([replace(study, trials=[*study.trials, twin])], "sqnr", "ridge")

    assert taken.groups[-1] == taken.groups[0]
    assert len(set(taken.groups)) > 50


def test_plans_are_grouped_as_pairwise_comparison_groups_them() -> None:
    made = small_study(40)
    chain = list(made.trials)
    names = list(chain[0].choices)
    for i in range(12):  # each nearly the one before, the last far from the first
        other = dict(chain[-1 if i else 0].choices)
        other[names[i % len(names)]] = chain[20 + i].choices[names[i % len(names)]]
        chain.append(replace(chain[0], choices=other, name=f"near-{i}", plan=f"near-{i}"))
    near = replace(made, trials=chain)
    layers = [layer.name for layer in made.graph.quantizable]

    found = _alike(near)

    alike = [
        [sum(a.choices[n] == b.choices[n] for n in layers) / len(layers) > 0.8 for b in chain]
        for a in chain
    ]
    expected = connected_components(np.array(alike), directed=False)[1]
    assert [list(found == x) for x in found] == [list(expected == x) for x in expected]
    assert len(set(found)) < len(chain)


def test_every_plan_is_predicted_without_itself(study: Study) -> None:
    honest = training_set([study], "sqnr", "ridge")
    spoilt = replace(honest, target=np.where(np.arange(60) == 7, 1e3, honest.target))

    a, b = (cross_validate(x, "ridge", seed=1) for x in (honest, spoilt))

    assert a[7] == b[7]
    assert not np.array_equal(a, b)


def test_a_graph_is_predicted_from_the_others() -> None:
    studies = {
        "one": small_study(60),
        "two": small_study(60, seed=3, graph=small_graph(blocks=5, width=8)),
    }

    found = by_graph(studies, "sqnr", "ridge")

    assert set(found) == {"one", "two"}
    assert min(s.spearman for s in found.values()) > 0.6


def test_leaving_a_graph_out_needs_two(study: Study) -> None:
    with pytest.raises(QSearchError, match="needs studies of two graphs"):
        by_graph({"one": study}, "sqnr", "ridge")


@pytest.mark.parametrize("kind", plugins.names("surrogates"))
def test_a_surrogate_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    study = small_study(12)
    made = fit(study.graph, study.trials, study.tables, metric="ssim", kind=kind, folds=2)

    made.save(tmp_path)
    again = Surrogate.load(tmp_path / "ssim", study.graph.id)

    plans = small_plans(study.graph, 3, seed=4)
    assert again.predict(study.graph, plans, study.tables) == made.predict(
        study.graph, plans, study.tables
    )
    assert (again.scores, again.graphs, again.schemes, again.metric) == (
        made.scores,
        made.graphs,
        made.schemes,
        "ssim",
    )


def test_a_plan_of_another_graph_is_refused_with_both_names(fitted: Surrogate) -> None:
    other = small_graph(width=8, model="other")

    with pytest.raises(QSearchError, match=r"was fitted on world \(.*\); other is graph"):
        fitted.predict(other, {"p": Plan.uniform(other, "uint4-c")})


def test_a_file_for_another_graph_is_refused(fitted: Surrogate, tmp_path: Path) -> None:
    fitted.save(tmp_path)

    with pytest.raises(ArtifactError, match="was fitted on world"):
        Surrogate.load(tmp_path / "sqnr", small_graph(width=8).id)


def test_a_scheme_that_no_plan_had_is_refused(fitted: Surrogate, study: Study) -> None:
    with pytest.raises(QSearchError, match="plan p has e2m1-g64"):
        fitted.predict(study.graph, {"p": Plan.uniform(study.graph, "e2m1-g64")}, study.tables)


def test_predicting_without_the_table_that_was_learnt_with_is_refused(
    fitted: Surrogate, study: Study
) -> None:
    with pytest.raises(QSearchError, match="it comes from a sensitivity table"):
        fitted.predict(study.graph, study.plans())


@pytest.mark.parametrize(
    "spoil", ['{"header": {}}', "{", '{"header": {"schema": "qsearch.surrogate/1"}}']
)
def test_a_file_that_is_no_surrogate_is_refused(
    fitted: Surrogate, tmp_path: Path, spoil: str
) -> None:
    fitted.save(tmp_path)
    (tmp_path / "sqnr" / "surrogate.json").write_text(spoil)

    with pytest.raises(ArtifactError):
        Surrogate.load(tmp_path / "sqnr")


def test_the_file_says_how_good_it_is(fitted: Surrogate, tmp_path: Path) -> None:
    fitted.save(tmp_path)

    said = json.loads((tmp_path / "sqnr" / "surrogate.json").read_text())

    assert said["scores"]["spearman"] == fitted.scores.spearman
    assert len(said["residuals"]) == 60


def test_a_metric_that_never_varies_is_refused(study: Study) -> None:
    with pytest.raises(
        QSearchError, match=r"constant is 0\.5 for all 60 plans: measure coarser plans"
    ):
        fit(study.graph, study.trials, study.tables, metric="constant")


def test_fewer_plans_than_folds_are_refused(study: Study) -> None:
    with pytest.raises(QSearchError, match="5 folds need 5 plans that differ; given 4 of 4"):
        fit(study.graph, study.trials[:4], study.tables, metric="sqnr", kind="ridge")


def test_a_metric_that_was_not_measured_is_refused_with_the_nearest(study: Study) -> None:
    with pytest.raises(QSearchError, match="alignmnt was not measured of plan plan 000"):
        fit(study.graph, study.trials, study.tables, metric="alignmnt")


def test_measured_plans_that_lack_a_layer_are_refused(study: Study) -> None:
    layers = {k: v for k, v in study.trials[0].choices.items() if k != "last"}

    with pytest.raises(QSearchError, match="last has none"):
        fit(
            study.graph,
            [replace(study.trials[0], choices=layers), *study.trials[1:]],
            study.tables,
            metric="sqnr",
        )


def test_an_unknown_surrogate_is_answered_with_the_nearest(study: Study) -> None:
    with pytest.raises(QSearchError, match="did you mean 'xgboost'"):
        fit(study.graph, study.trials, study.tables, metric="sqnr", kind="xgbost")


def test_scores_are_those_of_scipy_and_the_best_ten_count() -> None:
    dice = np.random.default_rng(0)
    truth = dice.normal(size=40)
    guess = truth + dice.normal(size=40)

    found = score(guess, truth)

    assert found.spearman == pytest.approx(spearmanr(guess, truth).statistic)
    assert found.kendall == pytest.approx(kendalltau(guess, truth).statistic)
    assert score(truth, truth).ndcg == pytest.approx(1.0)
    swapped = truth.copy()
    worst, best = np.argmin(truth), np.argmax(truth)
    swapped[[worst, best]] = truth[[best, worst]]
    assert score(swapped, truth).ndcg < 0.95
    assert score(-truth, -truth, lower_is_better=True).ndcg == pytest.approx(1.0)


@pytest.mark.parametrize("metric", ["sqnr", "alignment", "ssim"])
def test_what_is_learnt_on_another_scale_comes_back_in_the_same_order(metric: str) -> None:
    values = np.array([0.1, 0.5, 0.9, 0.99, 1.0])

    found = linked(metric, values)

    np.testing.assert_allclose(unlinked(metric, found), values, atol=1e-12)
    assert (np.diff(found) > 0).all()


def test_predictions_of_a_share_never_exceed_one_by_more_than_the_least_loss() -> None:
    study = small_study(40)
    made = fit(study.graph, study.trials, study.tables, metric="ssim", kind="ridge")

    found = made.predict(
        study.graph, {"keep": Plan.uniform(study.graph, "keep"), **study.plans()}, study.tables
    )

    assert all(low <= y <= high <= 1.001 for y, low, high in found.values())
    assert min(low for _, low, _ in found.values()) < 0.9
