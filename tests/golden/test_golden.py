"""Files outlive code: one file of every schema version that was ever written still loads and says
the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qsearch.core.attribution import Attribution
from qsearch.core.cost import Budget
from qsearch.core.graph import OpGraph
from qsearch.core.latency import Latency
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.core.trials import Trials
from qsearch.learn.contracts import small_graph
from qsearch.learn.data import Data
from qsearch.learn.surrogate import Surrogate
from tests.conftest import make_graph
from tests.golden import make


def every(noun: str) -> list[Path]:
    """The golden files of a noun, one a version."""
    return sorted(make.FOLDER.glob(f"{noun}-*.*"))


def test_today_s_version_of_every_file_is_among_them() -> None:
    assert [path.name for path in make.paths().values() if not path.exists()] == []


@pytest.mark.parametrize("path", every("graph"), ids=lambda path: path.name)
def test_every_version_of_a_graph_loads(path: Path) -> None:
    graph = OpGraph.load(path)

    assert graph == make_graph()
    assert graph.header is not None
    assert graph.header.key == "golden"


@pytest.mark.parametrize("path", every("table"), ids=lambda path: path.name)
def test_every_version_of_a_table_loads(path: Path) -> None:
    table = SensitivityTable.load(path, make_graph().id)

    assert table.frame.to_dict("records") == make.ROWS


def test_a_plan_of_the_first_version_loads() -> None:
    plan = Plan.load(make.FOLDER / "plan-1.json", make_graph())

    assert {name: str(scheme) for name, scheme in plan.layers.items()} == make.LAYERS
    assert (plan.budget, plan.solver) == (Budget(average_bits=8.0), make.SOLVER)


def test_a_plan_whose_schemes_have_ranges_of_steps_loads_as_a_plan_over_ranges() -> None:
    plan = Plan.load(make.FOLDER / "ranged-plan-1.json", make_graph())

    assert len(plan.steps) == 2
    assert plan.text("blocks.0.to_q") == "int2-c+a8~balance30 | int2-c+a8~balance30"
    assert plan.text("out") == make.LAYERS["out"]


def test_a_plan_over_ranges_of_steps_loads() -> None:
    plan = Plan.load(make.FOLDER / "plan-2.json", make_graph())

    assert len(plan.steps) == 2
    assert plan.text("out") == "uint8-t | uint4-c+a8t"
    assert plan.text("embed") == "keep"


def test_a_step_wise_plan_of_before_loads() -> None:
    plan = Plan.load(make.FOLDER / "stepplan-1.json", make_graph())

    assert plan.text("out") == "uint4-c | uint8-t"
    assert plan.text("blocks.0.ff") == make.LAYERS["blocks.0.ff"]
    assert (plan.budget, plan.solver) == (Budget(average_bits=9.0), make.SOLVER)


@pytest.mark.parametrize("path", every("latency"), ids=lambda path: path.name)
def test_every_version_of_a_latency_table_loads(path: Path) -> None:
    table = Latency.load(path, make_graph().id)

    assert (table.device, table.rest) == ("a clock", 5e-4)
    assert table.seconds["out"] == {"keep": 2e-3, "uint8-t": 1e-3}


@pytest.mark.parametrize("path", every("trials"), ids=lambda path: path.name)
def test_every_version_of_a_trials_file_loads(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path)  # opening a database may write to it

    (trial,) = Trials(tmp_path / path.name, make_graph()).all()

    assert (trial.name, trial.metrics, trial.setting) == ("golden", make.METRICS, "setting")
    assert trial.choices == {name: (Scheme.parse(text),) for name, text in make.LAYERS.items()}


@pytest.mark.parametrize("path", every("attribution"), ids=lambda path: path.name)
def test_every_version_of_an_attribution_loads(path: Path) -> None:
    found = Attribution.load(path, make_graph().id)

    assert found.frame.to_dict("records") == make.SHARES


@pytest.mark.parametrize("path", every("surrogate"), ids=lambda path: path.name)
def test_every_version_of_a_surrogate_loads(path: Path) -> None:
    found = Surrogate.load(path / "sqnr", small_graph().id)

    assert (found.kind, found.metric, found.scores.plans, len(found.residuals)) == (
        "ridge",
        "sqnr",
        6,
        6,
    )
    average = Data(
        found.columns,
        np.array(json.loads((path / "sqnr" / "ridge.json").read_text())["centre"])[None],
    )
    assert found.model.predict(average) == pytest.approx(14.67121668, rel=1e-6)
