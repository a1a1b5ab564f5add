"""Many plans are measured once each, by any number of workers, and a killed one leaves nothing half
done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.settings import checked
from qsearch.core.trials import Trials
from qsearch.decide.draws import draw
from qsearch.graphs.extraction import extract
from qsearch.measure import plan_evaluation as module
from qsearch.measure.evaluation import evaluate, make
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.options import CalibrateOptions
from qsearch.measure.pipelines import Sampling, example_inputs, record, scene_prompts
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.quantized_weights import weights_for
from qsearch.measure.setting import Calibration, EvaluationSetting
from tests.models import tiny_pipeline

SAMPLING = Sampling(steps=2, seed=3)
SCHEMES = ("uint2-c", "uint4-c", "uint8-c")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def graph(pipe: Any) -> OpGraph:
    (call,) = record(pipe, scene_prompts(1, 0), SAMPLING, 1)
    return extract(pipe.unet, example_inputs(call, pipe.unet))


@pytest.fixture
def task(pipe: Any, graph: OpGraph, tmp_path: Path) -> EvaluationTask:
    chosen_by = Calibration(scene_prompts(4, 0), Sampling(2, 4.0, 9, 4), CalibrateOptions(bins=2))
    setting = EvaluationSetting(
        scene_prompts(8, 1), SAMPLING, ("sqnr", "ssim"), "setting", chosen_by
    )
    return EvaluationTask(tmp_path / "pipe", graph, setting, tmp_path / "trials.db")


def test_every_plan_is_measured_once_as_it_is_measured_alone(
    pipe: Any, graph: OpGraph, task: EvaluationTask
) -> None:
    plans = draw(graph, SCHEMES, 3)
    steps: list[int] = []

    assert measure_plans(task, plans, pipe=pipe, progress=steps.append) == 3
    assert measure_plans(task, draw(graph, SCHEMES, 4), pipe=pipe) == 1  # three were there

    trials = Trials(task.where, graph).measured()
    assert sum(steps) == 3
    assert [t.name for t in trials] == [f"random-0-00{i}" for i in range(4)]
    prompts = task.setting.prompts
    reference, made = (
        make(pipe, graph, p, prompts, SAMPLING)
        for p in (Plan.uniform(graph, "keep"), plans["random-0-001"])
    )
    for metric, (value, error) in evaluate(made, reference, ("sqnr", "ssim")).items():
        assert trials[1].metrics[metric][0] == pytest.approx(value, rel=1e-5)
        assert trials[1].metrics[metric][1] == pytest.approx(error, rel=1e-5)
        assert np.mean(trials[1].samples[metric]) == pytest.approx(value, rel=1e-5)
        assert len(trials[1].samples[metric]) == 8


def test_plans_that_ask_for_calibration_are_measured_with_the_codes_that_it_gives(
    pipe: Any, graph: OpGraph, task: EvaluationTask
) -> None:
    plans = {s: Plan.uniform(graph, s) for s in ("uint3-c@gptq", "uint4-c+a8t~balance")}
    said: list[str] = []

    assert measure_plans(task, plans, pipe=pipe, say=said.append) == 2

    assert said == []
    setting = task.setting
    assert setting.calibration is not None
    calls = setting.calibration.record(pipe)
    whole = make(pipe, graph, Plan.uniform(graph, "keep"), setting.prompts, SAMPLING)
    for trial in Trials(task.where, graph).measured():
        plan = plans[trial.name]
        weights = weights_for(pipe.unet, graph, [plan], calls)
        made = make(pipe, graph, plan, setting.prompts, SAMPLING, weights=weights)
        expected = evaluate(made, whole, setting.metrics)
        for metric, pair in expected.items():
            assert trial.metrics[metric] == pytest.approx(pair, rel=1e-4), (trial.name, metric)


def test_measured_metrics_are_the_values_of_the_study_in_their_directions(
    pipe: Any, graph: OpGraph, task: EvaluationTask
) -> None:
    measure_plans(task, draw(graph, SCHEMES, 2), pipe=pipe)

    url = f"sqlite:///{task.where}"
    name = "qsearch.trials/1 sqnr+ ssim+"
    study = optuna.load_study(study_name=name, storage=url)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert study.metric_names == ["sqnr", "ssim"]
    stored = {t.user_attrs["name"]: t.values for t in study.get_trials()}
    for trial in Trials(task.where, graph).measured():
        assert stored[trial.name] == [trial.metrics["sqnr"][0], trial.metrics["ssim"][0]]


def test_where_no_plan_can_be_measured_the_reason_is_an_error(
    pipe: Any, graph: OpGraph, task: EvaluationTask
) -> None:
    blind = replace(task, setting=replace(task.setting, calibration=None))
    plans = {s: Plan.uniform(graph, s) for s in ("uint3-c@gptq", "uint4-c@gptq")}

    with pytest.raises(QSearchError, match="calibrat"):
        measure_plans(blind, plans, pipe=pipe)


def test_a_clearly_bad_plan_is_given_up_and_another_measured_in_two_parts_as_in_one(
    pipe: Any, graph: OpGraph, task: EvaluationTask
) -> None:
    plans = {"bad": Plan.uniform(graph, "int2-t"), "good": Plan.uniform(graph, "uint8-c")}
    said: list[str] = []

    measure_plans(replace(task, stop={"sqnr": 20.0}), plans, pipe=pipe, say=said.append)
    whole_setting = replace(task.setting, key="whole")
    measure_plans(replace(task, setting=whole_setting), plans, pipe=pipe)

    early = {t.name: t for t in Trials(task.where, graph).measured("setting")}
    whole = {t.name: t for t in Trials(task.where, graph).measured("whole")}
    assert (early["bad"].stopped, len(early["bad"].samples["sqnr"]), early["good"].stopped) == (
        True,
        3,
        False,
    )
    assert said == ["bad was stopped early after 3 samples"]
    assert early["bad"].samples["sqnr"] == pytest.approx(whole["bad"].samples["sqnr"][:3], rel=1e-4)
    assert early["good"].samples["ssim"] == pytest.approx(whole["good"].samples["ssim"], rel=1e-4)
    assert (
        measure_plans(task, plans, pipe=pipe) == 1
    )  # whoever gives nothing up wants the bad one whole
    assert [t.stopped for t in Trials(task.where, graph).measured("setting")] == [False, False]


def test_stopping_by_a_metric_that_is_not_measured_is_refused(task: EvaluationTask) -> None:
    with pytest.raises(QSearchError, match="alignment is not among sqnr, ssim"):
        replace(task, stop={"alignment": 0.5})


def test_a_plan_that_another_worker_measured_meanwhile_is_not_measured_again(
    pipe: Any, graph: OpGraph, task: EvaluationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = draw(graph, SCHEMES, 2)
    honest = module.EvaluationWorker.measure

    def measure(self: module.EvaluationWorker, plan: Plan) -> Any:
        found = honest(self, plan)
        other = next(name for name, p in plans.items() if p.id != plan.id)
        Trials(task.where, graph).add(
            other, plans[other], found[0], "setting"
        )  # somebody else, while we were at it
        return found

    monkeypatch.setattr(module.EvaluationWorker, "measure", measure)

    assert measure_plans(task, plans, pipe=pipe) == 1
    assert len(Trials(task.where, graph).all()) == 2


def test_a_plan_that_cannot_be_measured_is_passed_over_with_a_word(
    pipe: Any, graph: OpGraph, task: EvaluationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, said = draw(graph, SCHEMES, 2), list[str]()
    bad = plans["random-0-000"].id
    honest = module.EvaluationWorker.measure

    def measure(self: module.EvaluationWorker, plan: Plan) -> Any:
        if plan.id == bad:
            raise QSearchError("latents that are not finite")
        return honest(self, plan)

    monkeypatch.setattr(module.EvaluationWorker, "measure", measure)

    assert measure_plans(task, plans, pipe=pipe, say=said.append) == 1
    assert said == ["random-0-000 is passed over: latents that are not finite"]
    assert [t.name for t in Trials(task.where, graph).measured()] == ["random-0-001"]


def test_no_worker_is_refused(graph: OpGraph, task: EvaluationTask) -> None:
    with pytest.raises(QSearchError, match=r"workers: .*greater than or equal to 1; given 0"):
        checked(ExecutorOptions, {"workers": 0})
    with pytest.raises(QSearchError, match="local is one worker; given 2"):
        options = ExecutorOptions(executor="local", workers=2)
        measure_plans(task, draw(graph, SCHEMES, 2), options)


#: measures plans of the pipeline in FOLDER until it is done, or killed; the last argument is the
#: number of workers
SCRIPT = """
import sys
from pathlib import Path
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.decide.draws import draw
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.pipelines import Sampling, scene_prompts
from qsearch.measure.setting import EvaluationSetting

if __name__ == "__main__":
    folder, count, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    graph = OpGraph.load(folder / "graph.json")
    sampling = Sampling(steps=2, seed=3)
    setting = EvaluationSetting(scene_prompts(4, 1), sampling, ("sqnr",), "setting")
    task = EvaluationTask(folder / "pipe", graph, setting, folder / "trials.db")
    try:
        plans, by = draw(graph, ("uint2-c", "uint4-c"), count), ExecutorOptions(workers=workers)
        said = lambda n: print("one", flush=True) if n else None
        measure_plans(task, plans, by, progress=said)
    except QSearchError as error:
        print(error)
        sys.exit(2)
"""


def run(folder: Path, count: int, workers: int) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), str(folder), str(count), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
    )


def begun(
    pipe: Any, graph: OpGraph, folder: Path, count: int, workers: int
) -> subprocess.Popen[str]:
    """`run` of a saved pipeline, once three plans are measured."""
    pipe.save_pretrained(folder / "pipe")
    graph.save(folder / "graph.json")
    process = run(folder, count, workers)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    return process


def children(pid: int) -> list[int]:
    """Worker processes of a pool: children that hold the pipeline, which the resource tracker does
    not.
    """
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if "spawn_main" in line]


@pytest.mark.slow
def test_a_worker_killed_mid_evaluation_loses_its_plan_alone_and_the_next_call_goes_on(
    pipe: Any, graph: OpGraph, tmp_path: Path
) -> None:
    process = begun(pipe, graph, tmp_path, 200, 2)
    os.kill(children(process.pid)[0], signal.SIGKILL)

    said = process.communicate(timeout=300)[0]

    assert process.returncode == 2
    assert "a worker was killed" in said
    assert "the same command goes on" in said
    stored = Trials(tmp_path / "trials.db", graph).all()
    assert len(stored) >= 3
    assert all(np.isfinite(t.metrics["sqnr"][0]) and len(t.samples["sqnr"]) == 4 for t in stored)
    again = run(tmp_path, len(stored) + 2, 1)
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert len({t.plan for t in Trials(tmp_path / "trials.db", graph).all()}) >= len(stored) + 1


def test_a_process_killed_at_any_moment_leaves_whole_trials(
    pipe: Any, graph: OpGraph, tmp_path: Path
) -> None:
    process = begun(pipe, graph, tmp_path, 300, 1)
    time.sleep(0.02)
    process.kill()
    said = 3 + len(process.communicate()[0].splitlines())

    stored = Trials(tmp_path / "trials.db", graph).all()

    assert said <= len(stored) <= said + 1
    assert all(np.isfinite(t.metrics["sqnr"][0]) and len(t.samples["sqnr"]) == 4 for t in stored)
