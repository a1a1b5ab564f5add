"""One worker or several, here, in processes or on Ray: the same trials and tables to the last
digit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.table import SensitivityTable
from qsearch.core.trials import Trials
from qsearch.decide.draws import draw
from qsearch.graphs.extraction import extract
from qsearch.measure.executing import ExecutorOptions, threads_set
from qsearch.measure.options import CalibrateOptions, ProfileOptions
from qsearch.measure.parted import Parted
from qsearch.measure.pipelines import Sampling, example_inputs, record, scene_prompts
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.setting import Calibration, EvaluationSetting
from tests.models import tiny_pipeline

SAMPLING = Sampling(steps=2, seed=3)
SCHEMES = ("uint2-c", "uint4-c+a8")
WAYS = {
    "one process": ExecutorOptions(executor="pool", workers=1),
    "two processes": ExecutorOptions(executor="pool", workers=2),
    "two actors": ExecutorOptions(executor="ray", workers=2),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def graph(pipe: Any) -> OpGraph:
    (call,) = record(pipe, scene_prompts(1, 0), SAMPLING, 1)
    return extract(pipe.unet, example_inputs(call, pipe.unet))


def ways(quick: str) -> list[Any]:
    """All ways, those marked slow that are not `quick`: each imports torch in two processes."""
    return [way if way == quick else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]


@pytest.mark.filterwarnings("ignore")  # of Ray, in its own threads
@pytest.mark.parametrize("way", ways("two processes"))
def test_plans_are_measured_the_same_to_the_last_digit(
    way: str, folder: Path, graph: OpGraph, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if WAYS[way].executor == "ray":
        request.getfixturevalue("ray_here")
    chosen_by = Calibration(scene_prompts(2, 0), Sampling(2, 4.0, 9, 4), CalibrateOptions(bins=1))
    setting = EvaluationSetting(scene_prompts(4, 1), SAMPLING, ("sqnr",), "setting", chosen_by)
    here = EvaluationTask(folder, graph, setting, tmp_path / "here.db")
    plans = draw(graph, SCHEMES, 4)
    measure_plans(here, plans)

    done = measure_plans(replace(here, where=tmp_path / "there.db"), plans, WAYS[way])

    assert done == 4
    expected, found = (Trials(tmp_path / f"{x}.db", graph).measured() for x in ("here", "there"))
    assert [(t.name, t.metrics, t.samples) for t in found] == [
        (t.name, t.metrics, t.samples) for t in expected
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["step", "trajectory"])
def test_tables_are_the_same_to_the_last_digit(
    way: str, mode: Any, pipe: Any, folder: Path, graph: OpGraph, request: pytest.FixtureRequest
) -> None:
    if WAYS[way].executor == "ray":
        request.getfixturevalue("ray_here")
    metric = "noise" if mode == "step" else "sqnr"
    options = ProfileOptions(
        schemes=SCHEMES, bins=1, samples=4, batch=2, probes=10, mode=mode, metrics=(metric,)
    )
    calibration = record(pipe, scene_prompts(2, 0), SAMPLING, 1, 2)
    prompts = scene_prompts(4, 0)
    parted = Parted(folder, graph, SAMPLING, calibration=calibration).by(WAYS[way], print)

    with threads_set(1):
        here = profile_pipeline(pipe, graph, prompts, SAMPLING, options, calibration=calibration)
        there = profile_pipeline(
            pipe, graph, prompts, SAMPLING, options, calibration=calibration, parted=parted
        )

    assert rows(there) == rows(here)
    assert here.responses is not None
    assert there.responses is not None
    for cell, values in here.responses.values.items():
        assert np.array_equal(values, there.responses.values[cell])


def rows(table: SensitivityTable) -> list[dict[str, Any]]:
    return table.frame.sort_values(["site", "scheme", "step"]).to_dict("records")


def test_other_estimators_are_refused_by_name(pipe: Any, folder: Path, graph: OpGraph) -> None:
    parted = Parted(folder, graph, SAMPLING).by(WAYS["one process"], print)
    options = ProfileOptions(schemes=SCHEMES, bins=1, samples=2, estimator="sweep")

    with pytest.raises(QSearchError, match="sweep works in one process"):
        profile_pipeline(pipe, graph, scene_prompts(2, 0), SAMPLING, options, parted=parted)
