"""Storages are named without being told: by a variable, by a file; what is said of them is
redacted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import exc

from qsearch.core.artifacts import without_secrets
from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.storage import patiently, place_of, storage_url
from qsearch.core.trials import Trials

URL = "postgresql://me:s3cret@127.0.0.1:9/trials"


def test_a_url_is_read_from_a_variable_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALS", f" {URL}\n")
    (tmp_path / "url").write_text(f"{URL}\nand a note\n")

    assert storage_url("env:TRIALS") == storage_url(f"file:{tmp_path / 'url'}") == URL
    for plain in (URL, "trials.db", "sqlite:///trials.db", "file:///a", "C:/trials.db"):
        assert storage_url(plain) == plain


@pytest.mark.parametrize("given", ["env:NOT_THERE", "file:not/there"])
def test_a_variable_or_file_that_is_not_there_is_said(given: str) -> None:
    with pytest.raises(QSearchError, match=r"holds one; the .* holds none"):
        storage_url(given)


def test_a_url_without_a_driver_gets_one_that_we_install() -> None:
    assert place_of(URL) == URL.replace("postgresql", "postgresql+psycopg")
    assert place_of("mysql://a/b") == "mysql+pymysql://a/b"
    assert place_of("postgresql+asyncpg://a/b") == "postgresql+asyncpg://a/b"
    assert place_of("sqlite:///a.db") == Path("a.db").resolve()


@pytest.mark.parametrize("password", ["s3cret", "s3:cret", "s3@cret", "s3/cret", "%73cret@s3cret"])
def test_a_password_is_not_printed_however_it_is_written(password: str) -> None:
    said = without_secrets(f"opening postgresql://me:{password}@db:5432/trials now")

    assert said == "opening postgresql://***@db:5432/trials now"


def test_a_server_that_does_not_answer_is_one_line_without_the_password(graph: OpGraph) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ArtifactError) as caught:
        Trials(URL, graph)

    assert "can't be opened as an Optuna study" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_said_with_the_remedy(graph: OpGraph) -> None:
    with pytest.raises(ArtifactError, match=r"`pip install 'psycopg\[binary\]' pymysql`"):
        Trials("mysql+mysqlconnector://me:s3cret@127.0.0.1:9/trials", graph)


def test_a_journal_holds_trials_and_another_file_is_refused(graph: OpGraph, tmp_path: Path) -> None:
    where, plan = f"journal:///{tmp_path}/trials.log", Plan.uniform(graph, "int4-c")
    Trials(where, graph).add("a", plan, {"noise": (0.5, 0.1)}, "s")

    assert [t.name for t in Trials(where, graph).measured()] == ["a"]
    (tmp_path / "notes").write_text("not a journal")
    with pytest.raises(ArtifactError, match="no journal of Optuna's"):
        Trials(f"journal:///{tmp_path}/notes", graph)


def test_trials_of_another_version_are_refused_with_both(graph: OpGraph, tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path}/trials.db"
    optuna.create_study(study_name="qsearch.trials/7", storage=url)

    with pytest.raises(ArtifactError, match=r"holds 'qsearch.trials/7', this qsearch .*trials/1'"):
        Trials(url, graph)


def test_whoever_wrote_waits_for_a_database_that_went_away_and_no_longer() -> None:
    away, tried = exc.OperationalError("select 1", {}, Exception("gone")), list[int]()

    def call(attempt: int) -> str:
        tried.append(attempt)
        if attempt < 2:
            raise away
        return "written"

    assert patiently(call) == "written"
    assert tried == [0, 1, 2]
    with pytest.raises(exc.OperationalError):
        patiently(lambda attempt: (_ for _ in ()).throw(away), patience=0.0)
    with pytest.raises(ValueError, match="ours"):
        patiently(lambda attempt: int("ours"))


def test_a_dashboard_finds_metrics_sizes_and_schemes(graph: OpGraph, tmp_path: Path) -> None:
    import optuna

    plan = Plan.uniform(graph, "int4-c")
    metrics = {"sqnr": (20.0, 0.1), "noise": (0.01, 0.0)}
    where = tmp_path / "trials.db"
    up = {"sqnr": True, "noise": False}
    Trials(where, graph).add("a", plan, metrics, "s", higher_is_better=up)

    study = optuna.load_study(
        study_name="qsearch.trials/1 noise- sqnr+", storage=f"sqlite:///{where}"
    )

    assert study.metric_names == ["noise", "sqnr"]
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    (trial,) = study.trials
    assert trial.values == [0.01, 20.0]
    assert trial.user_attrs["bytes"] == plan.achieved.bytes
    assert trial.user_attrs["schemes"] == {"int4-c": 3, "keep": 1}
