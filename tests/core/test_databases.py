"""Every storage holds the same trials: a SQLite file, a journal, a real PostgreSQL, a real
MariaDB.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qsearch.core.errors import ArtifactError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials
from tests.databases import URL_PASSWORD

METRICS = {"sqnr": (20.125, 0.1), "noise": (0.01, 0.0)}
UP = {"sqnr": True, "noise": False}
#: adds trials named WHO-0, WHO-1, ... of the graph at argv[1] to the storage argv[2]
WRITER = """
import sys
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials

graph = OpGraph.load(sys.argv[1])
trials, plan = Trials(sys.argv[2], graph), Plan.uniform(graph, "int4-c")
for i in range(10):
    found = {"sqnr": (float(i), 0.5)}
    trials.add(f"{sys.argv[3]}-{i}", plan, found, "setting", higher_is_better={"sqnr": True})
"""


def deep_graph(layers: int = 900) -> OpGraph:
    """As many layers as SDXL has, with names as long."""
    name = "down_blocks.2.attentions.1.transformer_blocks.{}.attn1.to_q"
    return OpGraph(
        "deep",
        tuple(
            LayerSpec(name.format(i), "self-attention-q", "linear", (8, 8), 64)
            for i in range(layers)
        ),
        (),
        (),
        (),
    )


def test_a_plan_of_hundreds_of_layers_with_thousands_of_samples_comes_back(where: str) -> None:
    graph = deep_graph()
    plan = Plan.uniform(graph, "int4-g64+a8@hqq")
    samples = {metric: [i + 0.123456 for i in range(5000)] for metric in METRICS}

    Trials(where, graph).add("a", plan, METRICS, "s", samples=samples, higher_is_better=UP)

    (trial,) = Trials(where, graph).all()
    assert trial.choices == dict(plan.choices)
    assert trial.samples == samples
    assert trial.metrics == METRICS
    found = Trials(where, graph).find(plan, "s")
    assert found is not None
    assert found.name == "a"


def test_two_writers_at_once_lose_nothing(where: str, graph: OpGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.json")
    arguments = [sys.executable, "-c", WRITER, str(tmp_path / "graph.json"), where]

    writers = [subprocess.Popen([*arguments, who]) for who in "ab"]

    assert [process.wait(600) for process in writers] == [0, 0]
    names = Counter(trial.name for trial in Trials(where, graph).all())
    assert names == {f"{who}-{i}": 1 for who in "ab" for i in range(10)}


def test_trials_of_another_model_are_refused(
    where: str, graph: OpGraph, other_graph: OpGraph
) -> None:
    Trials(where, graph)

    with pytest.raises(ArtifactError, match=f"holds trials of graph {graph.id}"):
        Trials(where, other_graph)


def test_a_wrong_password_is_one_line_without_it(where: str, graph: OpGraph) -> None:
    if URL_PASSWORD not in where:
        pytest.skip("a file has no password")

    with pytest.raises(ArtifactError, match="can't be opened") as caught:
        Trials(where.replace(URL_PASSWORD, "wr0ng%40word"), graph)

    for part in ("wr0ng", "\n", "tester:"):
        assert part not in str(caught.value)
