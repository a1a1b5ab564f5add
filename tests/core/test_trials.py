"""Trials: several writers, killed writers, and files that are somebody else's."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.trials import Trials

#: adds trials named WHO-0, WHO-1, … to the study at PATH until COUNT are in, a line on the screen
#: for each
WRITER = """
import sys
from pathlib import Path
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials

folder, who, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
graph = OpGraph.load(folder / "graph.json")
trials = Trials(folder / "trials.db", graph)
for i in range(count):
    trials.add(f"{who}-{i}", Plan.uniform(graph, "int4-c"), {"noise": (float(i), 0.5)}, "setting")
    print(i, flush=True)
"""
METRICS = {"noise": (0.25, 0.01), "ssim": (0.9, 0.0)}


def writer(folder: Path, who: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), who, str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )


def whole(trials: Trials) -> list[str]:
    """Names of all stored trials, each checked to be complete."""
    names = []
    for trial in trials.all():
        assert trial.metrics == {"noise": (float(trial.name.split("-")[1]), 0.5)}
        assert list(trial.choices) == [layer.name for layer in trials.graph]
        names.append(trial.name)
    return names


def test_a_trial_comes_back_as_it_was_added(graph: OpGraph, tmp_path: Path) -> None:
    plan = Plan.uniform(graph, "int4-c")

    Trials(tmp_path / "trials.db", graph).add("mine", plan, METRICS, "s1")

    (trial,) = Trials(tmp_path / "trials.db", graph).all()
    assert (trial.name, trial.metrics, trial.setting, trial.average_bits) == (
        "mine",
        METRICS,
        "s1",
        plan.achieved.average_bits,
    )
    assert trial.choices == {
        "embed": (Scheme.parse("keep"),),
        **dict.fromkeys(["blocks.0.to_q", "blocks.0.ff", "out"], (Scheme.parse("int4-c"),)),
    }


def test_a_trial_is_found_by_its_plan_and_its_setting_alone(graph: OpGraph, tmp_path: Path) -> None:
    trials, plan = Trials(tmp_path / "trials.db", graph), Plan.uniform(graph, "int4-c")
    trials.add("first", plan, METRICS, "s1")
    trials.add("again", plan, METRICS, "s1")

    found = trials.find(plan, "s1")
    assert found is not None
    assert found.name == "again"
    assert trials.find(plan, "s2") is None
    assert trials.find(Plan.uniform(graph, "int3-c"), "s1") is None


def test_two_processes_write_at_once_and_nothing_is_lost(graph: OpGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.json")

    writers = [writer(tmp_path, who, 15) for who in ("a", "b")]

    for process in writers:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert sorted(whole(Trials(tmp_path / "trials.db", graph))) == sorted(
        f"{who}-{i}" for who in "ab" for i in range(15)
    )


def test_a_writer_killed_at_any_moment_leaves_whole_trials_and_the_next_goes_on(
    graph: OpGraph, tmp_path: Path
) -> None:
    graph.save(tmp_path / "graph.json")
    kept = 0

    for round_, delay in enumerate((0.0, 0.013, 0.031)):
        process = writer(tmp_path, f"r{round_}", 10_000)
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        said += process.communicate()[0].splitlines()

        names = whole(Trials(tmp_path / "trials.db", graph))
        assert process.returncode == -signal.SIGKILL
        assert (
            len(said) <= len(names) - kept <= len(said) + 1
        )  # what was reported is there; at most the one in progress besides
        kept = len(names)

    trials = Trials(tmp_path / "trials.db", graph)
    trials.add("last-7", Plan.uniform(graph, "int4-c"), {"noise": (7.0, 0.5)}, "setting")
    assert len(whole(trials)) == kept + 1


def test_trials_of_another_graph_are_refused_with_both_graphs(
    graph: OpGraph, other_graph: OpGraph, tmp_path: Path
) -> None:
    Trials(tmp_path / "trials.db", graph)

    with pytest.raises(
        ArtifactError,
        match=f"holds trials of graph {graph.id}, wider is graph {other_graph.id}; give another",
    ):
        Trials(tmp_path / "trials.db", other_graph)


def test_a_plan_of_another_graph_is_not_added(
    graph: OpGraph, other_graph: OpGraph, tmp_path: Path
) -> None:
    trials = Trials(tmp_path / "trials.db", graph)

    with pytest.raises(
        QSearchError,
        match=f"the plan is for graph {other_graph.id}, the trials are of graph {graph.id}",
    ):
        trials.add("other", Plan.uniform(other_graph, "int4-c"), METRICS, "s")
    assert trials.all() == []


@pytest.mark.parametrize("pair", [(float("nan"), 0.0), (1.0, float("nan"))])
def test_a_metric_that_is_not_a_number_is_not_stored(
    graph: OpGraph, tmp_path: Path, pair: tuple[float, float]
) -> None:
    trials = Trials(tmp_path / "trials.db", graph)

    with pytest.raises(QSearchError, match="ssim of plan p is not a number; it is not stored"):
        trials.add("p", Plan.uniform(graph, "int4-c"), {"noise": (0.1, 0.0), "ssim": pair}, "s")
    assert trials.all() == []


@pytest.mark.parametrize(
    "content",
    [
        b"just some text, long enough for a header of a database\n" * 40,
        b"PK\x03\x04",
        b"SQLite format 3\x00" + bytes(200),
    ],
)
def test_a_file_that_is_no_database_is_refused_in_one_line_and_left_alone(
    graph: OpGraph, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "trials.db").write_bytes(content)

    with pytest.raises(
        ArtifactError, match=r"trials\.db can't be opened as an Optuna study"
    ) as caught:
        Trials(tmp_path / "trials.db", graph)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "trials.db").read_bytes() == content


def test_a_truncated_database_is_refused(graph: OpGraph, tmp_path: Path) -> None:
    Trials(tmp_path / "trials.db", graph).add("p", Plan.uniform(graph, "int4-c"), METRICS, "s")
    data = (tmp_path / "trials.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(data[: len(data) // 2])

    with pytest.raises(ArtifactError, match=r"cut\.db can't be opened as an Optuna study"):
        Trials(tmp_path / "cut.db", graph)


def test_somebody_else_s_database_is_refused_and_left_alone(graph: OpGraph, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "trials.db") as database:
        database.execute("create table recipes (name text)")
    database.close()
    before = (tmp_path / "trials.db").read_bytes()

    with pytest.raises(ArtifactError, match=r"trials\.db can't be opened as an Optuna study"):
        Trials(tmp_path / "trials.db", graph)
    assert (tmp_path / "trials.db").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(graph: OpGraph, blocked_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"blocked/trials\.db can't be opened"):
        Trials(blocked_folder / "trials.db", graph)
