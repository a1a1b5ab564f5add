"""SensitivityTable: rows by key, means over step bins, and the rows that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import OpGraph
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
    assert (loaded.graph, loaded.header.key, loaded.header.parents, loaded.header.seed) == (table.graph, "k", {"graph": table.graph}, 5)
    assert loaded.frame.to_dict("records") == table.frame.to_dict("records")
    assert list(loaded.frame.columns) == list(COLUMNS)


def test_values_are_means_over_the_step_bins_by_site_and_scheme(table: SensitivityTable) -> None:
    assert table.values() == {"blocks.0.ff": {"int4-c": 0.125}, "out": {"int4-c": 0.375, "int8-c": 1.5e-4}}


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
    with pytest.raises(QSearchError, match=r"every estimate must be a number; the first that is not belongs to blocks\.0\.ff"):
        SensitivityTable.from_rows(graph.id, [row("out", "int4-c", 0, 0.5), row("blocks.0.ff", "int4-c", 0, float("nan"))])


def test_a_missing_column_is_named(table: SensitivityTable) -> None:
    with pytest.raises(QSearchError, match=r"needs the columns .*; floor, seed missing"):
        SensitivityTable(table.graph, table.frame.drop(columns=["seed", "floor"]))


def test_a_table_fits_its_own_graph_and_no_other(table: SensitivityTable, graph: OpGraph, other_graph: OpGraph) -> None:
    table.check(graph)
    with pytest.raises(QSearchError, match=f"made for graph {graph.id}, wider is graph {other_graph.id}"):
        table.check(other_graph)


def test_a_table_that_speaks_of_an_unknown_layer_is_refused(graph: OpGraph) -> None:
    table = SensitivityTable.from_rows(graph.id, [row("outs", "int4-c", 0, 0.5)])

    with pytest.raises(QSearchError, match=r"no layer 'outs'; did you mean 'out'\?"):
        table.check(graph)


def test_a_file_of_another_graph_is_refused(table: SensitivityTable, tmp_path: Path, other_graph: OpGraph) -> None:
    table.save(tmp_path / "t.parquet")

    with pytest.raises(ArtifactError, match=f"made for graph {table.graph}, the model here is graph {other_graph.id}"):
        SensitivityTable.load(tmp_path / "t.parquet", other_graph.id)
