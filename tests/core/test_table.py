"""SensitivityTable: rows by key, means over step bins, and the rows that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.probe_responses import ProbeResponses, ratio
from qsearch.core.table import COLUMNS, SensitivityTable


def row(site: str, scheme: str, step: int, estimate: float, **rest: Any) -> dict[str, Any]:
    return {
        "site": site,
        "scheme": scheme,
        "step": step,
        "metric": "noise",
        "estimate": estimate,
        "error": 0.01,
        "floor": 1e-4,
        "estimator": "sweep",
        "seed": 0,
        **rest,
    }


@pytest.fixture
def table(graph: OpGraph) -> SensitivityTable:
    rows = [
        row("out", "int4-c", 0, 0.5),
        row("out", "int4-c", 1, 0.25),
        row("out", "int8-c", 0, 1.5e-4),
        row("blocks.0.ff", "int4-c", 0, 0.125),
        row("out", "int4-c", 0, 0.9, metric="ssim"),
    ]
    return SensitivityTable.from_rows(graph.id, rows)


def test_a_table_comes_back_from_its_file(table: SensitivityTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.parquet", key="k", parents={"graph": table.graph}, seed=5)

    loaded = SensitivityTable.load(tmp_path / "t.parquet", table.graph)
    assert loaded.header is not None
    assert (loaded.graph, loaded.header.key, loaded.header.parents, loaded.header.seed) == (
        table.graph,
        "k",
        {"graph": table.graph},
        5,
    )
    assert loaded.frame.to_dict("records") == table.frame.to_dict("records")
    assert list(loaded.frame.columns) == list(COLUMNS)


def test_values_are_means_over_the_step_bins_by_site_and_scheme(table: SensitivityTable) -> None:
    assert table.values() == {
        "blocks.0.ff": {"int4-c": 0.125},
        "out": {"int4-c": 0.375, "int8-c": 1.5e-4},
    }


def test_values_of_some_step_bins_leave_out_the_others(table: SensitivityTable) -> None:
    assert table.values(steps=[1]) == {"out": {"int4-c": 0.25}}


def test_values_of_another_metric_are_its_own(table: SensitivityTable) -> None:
    assert table.metrics == ["noise", "ssim"]
    assert table.values("ssim") == {"out": {"int4-c": 0.9}}


def test_an_unknown_metric_is_answered_with_the_nearest(table: SensitivityTable) -> None:
    with pytest.raises(QSearchError, match=r"no metric 'noyse'; did you mean 'noise'\?"):
        table.values("noyse")


def test_rows_within_three_decibels_of_the_floor_are_shown_as_such(table: SensitivityTable) -> None:
    assert table.at_floor()[["site", "scheme"]].values.tolist() == [["out", "int8-c"]]


def test_an_estimate_that_is_not_a_number_is_refused_with_its_site(graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError,
        match=r"every estimate must be a number; the first that is not belongs to blocks\.0\.ff",
    ):
        SensitivityTable.from_rows(
            graph.id, [row("out", "int4-c", 0, 0.5), row("blocks.0.ff", "int4-c", 0, float("nan"))]
        )


def test_a_missing_column_is_named(table: SensitivityTable) -> None:
    with pytest.raises(QSearchError, match=r"needs the columns .*; floor, seed missing"):
        SensitivityTable(table.graph, table.frame.drop(columns=["seed", "floor"]))


def test_a_table_fits_its_own_graph_and_no_other(
    table: SensitivityTable, graph: OpGraph, other_graph: OpGraph
) -> None:
    table.check(graph)
    with pytest.raises(
        QSearchError, match=f"made for graph {graph.id}, wider is graph {other_graph.id}"
    ):
        table.check(other_graph)


def test_a_table_that_speaks_of_an_unknown_layer_is_refused(graph: OpGraph) -> None:
    table = SensitivityTable.from_rows(graph.id, [row("outs", "int4-c", 0, 0.5)])

    with pytest.raises(QSearchError, match=r"no layer 'outs'; did you mean 'out'\?"):
        table.check(graph)


def test_a_file_of_another_graph_is_refused(
    table: SensitivityTable, tmp_path: Path, other_graph: OpGraph
) -> None:
    table.save(tmp_path / "t.parquet")

    with pytest.raises(
        ArtifactError,
        match=f"made for graph {table.graph}, the model here is graph {other_graph.id}",
    ):
        SensitivityTable.load(tmp_path / "t.parquet", other_graph.id)


PARTS, PROBES = 5, 4000


def probed(graph: OpGraph, sampler_steps: int = 1) -> SensitivityTable:
    """A linear world with two sites: `out` moves the output by a, `blocks.0.ff` by b, which partly
    cancel; rows and shares as probes would leave them.
    """
    dice = np.random.default_rng(0)
    move = dice.normal(size=(2, sampler_steps, 7, PARTS))  # site, sampler step, element, part
    move[1] -= 0.5 * move[0]
    signs = dice.choice([-1.0, 1.0], size=(PROBES, 7, PARTS))
    values = np.einsum("ctep,kep->ctkp", move, signs).astype(np.float32)
    power = dice.uniform(1.0, 2.0, PARTS)
    choices = (("out", "int4-c"), ("blocks.0.ff", "int4-c"))
    shares = ProbeResponses(
        choices,
        {("noise", 0): values, ("noise", 1): 2 * values},
        {("noise", 0): power, ("noise", 1): power},
    )
    rows = []
    for step in (0, 1):
        for i, (site, scheme) in enumerate(choices):
            value, error = shares.error(("noise", step), [i])
            rows.append(row(site, scheme, step, value, error=error, estimator="probe"))
    exact = move.sum(1)
    world = {"out": exact[0], "blocks.0.ff": exact[1], "both": exact.sum(0)}
    probed.truth = {k: float((v**2).sum() / power.sum()) for k, v in world.items()}  # type: ignore[attr-defined]
    return SensitivityTable.from_rows(graph.id, rows, shares)


PLAN = {"out": "int4-c", "blocks.0.ff": "int4-c", "embed": "keep"}
#: relative error of a mean of 4000 x 5 squared probes is about sqrt(2 / 20000) = 1%
NOISE = 0.04


@pytest.mark.parametrize("sampler_steps", [1, 3])
def test_a_plan_s_error_is_predicted_with_its_interactions(
    graph: OpGraph, sampler_steps: int
) -> None:
    table = probed(graph, sampler_steps)
    truth = probed.truth  # type: ignore[attr-defined]

    alone = {site: table.predict({site: "int4-c"}, steps=[0])[0] for site in ("out", "blocks.0.ff")}
    value, error = table.predict(PLAN, steps=[0])

    assert alone == pytest.approx({k: truth[k] for k in alone}, rel=NOISE)
    assert value == pytest.approx(truth["both"], rel=NOISE)
    assert (
        abs(truth["both"] / sum(alone.values()) - 1) > 0.1
    )  # else the case would not tell interactions from their absence
    assert 0 < error < value


def test_without_interactions_a_plan_s_error_is_the_sum_of_its_rows(graph: OpGraph) -> None:
    table = probed(graph)

    value, error = table.predict(PLAN, interactions=False)

    assert value == pytest.approx(table.frame["estimate"].sum() / 2)
    assert error == pytest.approx((table.frame["error"] ** 2).sum() ** 0.5 / 2)


def test_step_bins_are_averaged_and_a_plan_that_keeps_everything_costs_nothing(
    graph: OpGraph,
) -> None:
    table = probed(graph)

    assert table.predict(PLAN)[0] == pytest.approx(
        2.5 * table.predict(PLAN, steps=[0])[0]
    )  # the second bin's shares are twice as large
    assert table.predict({"out": "keep"}) == (0.0, 0.0)


def test_the_shares_of_sampler_steps_add_up_to_the_estimate(graph: OpGraph) -> None:
    table = probed(graph, sampler_steps=3)

    assert table.responses is not None
    steps = table.responses.step_shares(("noise", 0), 0)
    assert steps.shape == (3,)
    assert steps.sum() == pytest.approx(table.frame["estimate"].iloc[0])


def test_shares_come_back_from_the_file(graph: OpGraph, tmp_path: Path) -> None:
    table = probed(graph, sampler_steps=3)
    assert table.responses is not None
    table.responses.values["noise", 1][:, :, 7:, 2] = np.nan  # unfinished work has holes
    table.save(tmp_path / "t.parquet")

    loaded = SensitivityTable.load(tmp_path / "t.parquet", graph.id)

    assert loaded.responses is not None
    assert loaded.responses.choices == table.responses.choices
    for cell, values in table.responses.values.items():
        np.testing.assert_array_equal(loaded.responses.values[cell], values)
        np.testing.assert_array_equal(loaded.responses.power[cell], table.responses.power[cell])
    assert list(loaded.frame.columns) == list(COLUMNS)
    assert loaded.predict(PLAN) == table.predict(PLAN)


def test_the_stated_error_of_a_prediction_is_the_spread_over_seeds() -> None:
    dice = np.random.default_rng(1)
    found = np.array([ratio(dice.normal(size=(24, 8)) ** 2, np.ones(8)) for _ in range(400)])

    assert found[:, 0].std() == pytest.approx((2 / (24 * 8)) ** 0.5, rel=0.15)
    assert found[:, 1].mean() == pytest.approx(
        found[:, 0].std(), rel=0.25
    )  # the larger of two estimates of it


@pytest.mark.parametrize(
    ("plan", "metric", "steps", "words"),
    [
        ({"out": "int8-c"}, "noise", None, "no int8-c for out; did you mean 'out int4-c'"),
        ({"outt": "int4-c"}, "noise", None, "no int4-c for outt; did you mean 'out int4-c'"),
        (PLAN, "noisy", None, "no metric 'noisy'; did you mean 'noise'"),
        (PLAN, "noise", [7], r"none of the step bins \[7\]; it has \[0, 1\]"),
    ],
)
def test_a_prediction_that_the_table_can_t_make_is_refused(
    graph: OpGraph, plan: dict[str, str], metric: str, steps: Any, words: str
) -> None:
    with pytest.raises(QSearchError, match=words):
        probed(graph).predict(plan, metric, steps)


def test_a_table_without_shares_predicts_without_interactions_only(table: SensitivityTable) -> None:
    assert table.predict({"out": "int4-c"}, steps=[0, 1], interactions=False)[0] == pytest.approx(
        0.375
    )
    with pytest.raises(
        QSearchError,
        match=(
            "interactions need probe responses, which probes leave in the table; of noise by "
            "sweep there "
            "are none"
        ),
    ):
        table.predict({"out": "int4-c"})
