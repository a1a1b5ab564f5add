"""The learning verbs on a run's folder: many plans measured, surrogates fitted, a plan explained;
mistakes are one line.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qsearch.core.attribution import Attribution
from qsearch.core.errors import QSearchError
from qsearch.core.interactions import table_shrinkage_weight
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials
from qsearch.learn.contracts import SCHEMES, small_graph, small_study
from qsearch.learn.surrogate import Surrogate
from qsearch.measure.executing import ExecutorOptions
from qsearch.stages import config
from qsearch.stages.explain import ExplainSettings, explain
from qsearch.stages.extract import extract
from qsearch.stages.fit import FitSettings, fit
from qsearch.stages.folder import Run
from tests.conftest import Command
from tests.models import tiny_pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a graph, a table of probes, a plan and sixteen measured plans; no model."""
    made, folder = small_study(16), tmp_path_factory.mktemp("made")
    made.graph.save(folder / "graph.json")
    made.tables[0].save(folder / "sensitivity.parquet")
    Plan.uniform(made.graph, "uint3-c").save(folder / "plan.json")
    trials = Trials(folder / "trials.db", made.graph)
    for trial in made.trials:
        trials.add(
            trial.name,
            trial.made(made.graph),
            {k: v for k, v in trial.metrics.items() if k != "constant"},
            "setting",
        )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, with a config."""
    folder = Path(shutil.copytree(made, tmp_path / "run"))
    config.save(config.Config(model="scenes-dit", folder=folder), folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    "by",
    [
        ExecutorOptions(executor="local"),
        pytest.param(ExecutorOptions(executor="pool", workers=2), marks=pytest.mark.slow),
        pytest.param(ExecutorOptions(executor="ray", workers=2), marks=pytest.mark.slow),
    ],
    ids=["local", "pool", "ray"],
)
@pytest.mark.parametrize("kind", ["ridge", "xgboost"])
@pytest.mark.filterwarnings("ignore")  # of Ray, in its own threads
def test_folds_are_predicted_the_same_whoever_does_them(
    folder: Path, kind: str, by: ExecutorOptions, request: pytest.FixtureRequest
) -> None:
    if by.executor == "ray":
        request.getfixturevalue("ray_here")
    run = Run(config.load(folder / "config.yaml"))
    asked = FitSettings(metrics=("sqnr",), surrogate=kind)

    (here,), (there,) = fit(run, asked), fit(run, asked, by=by)

    assert there.scores == here.scores
    assert (there.residuals == here.residuals).all()


def test_fit_takes_an_executor_and_a_storage_that_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    (folder / "trials.db").rename(folder / "elsewhere.db")
    monkeypatch.setenv("TRIALS", f"sqlite:///{folder}/elsewhere.db")
    where = ("--storage", "env:TRIALS", "--executor", "local")

    code, _, said = command("fit", folder, "--surrogate", "ridge", *where)
    refused, _, why = command("fit", folder, "--storage", "env:NOTHING")

    assert code == 0, said
    assert refused == 2
    assert "the environment variable NOTHING holds none" in " ".join(why.split())


def test_fit_and_explain_write_what_they_promise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    code, shown, said = command("fit", folder, "--surrogate", "ridge")

    assert code == 0, said
    assert "sqnr" in shown
    graph = small_graph()
    for metric in ("sqnr", "ssim"):
        surrogate = Surrogate.load(folder / "surrogate" / metric, graph.id)
        assert surrogate.scores.plans == 16
        assert f"{surrogate.scores.spearman:.4g}" in shown

    code, shown, said = command("explain", folder, "--top", 3)

    assert code == 0, said
    found = Attribution.load(folder / "attribution.parquet", graph.id)
    assert set(found.frame["kind"]) == {"layer", "pair", "feature"}
    assert set(found.frame["metric"]) == {"noise", "sqnr", "ssim"}
    assert (
        len(set(found.select(kind="feature", metric="sqnr")["plan"])) == 17
    )  # the plan itself and all that were measured
    loudest = next(iter(found.totals(plan="plan", method="shapley", kind="layer", metric="noise")))
    assert loudest in shown


def test_a_uniform_baseline_changes_what_a_plan_is_compared_with(folder: Path) -> None:
    job = Run(config.load(folder / "config.yaml"))

    found = explain(job, ExplainSettings(baseline="int8-c"))

    base, table = Plan.uniform(small_graph(), "int8-c"), small_study(1).tables[0]
    assert table.responses is not None
    summed, whole = (table.predict(base, interactions=products)[0] for products in (False, True))
    trust = table_shrinkage_weight(table.responses, "noise")
    assert found.frame["base"].iloc[0] == pytest.approx(trust * whole + (1 - trust) * summed)


def test_a_surrogate_that_never_saw_a_scheme_of_the_plan_is_left_out_with_a_word(
    folder: Path, command: Command
) -> None:
    assert command("fit", folder, "--surrogate", "ridge", "--metrics", "sqnr")[0] == 0
    path = folder / "surrogate" / "sqnr" / "surrogate.json"
    content = json.loads(path.read_text())
    content["schemes"].remove("uint3-c")
    path.write_text(json.dumps(content))

    with pytest.raises(QSearchError, match="the surrogate was fitted on the schemes"):
        Surrogate.load(path.parent).predict(
            small_graph(), {"p": Plan.uniform(small_graph(), "uint3-c")}, small_study(1).tables
        )
    code, _, said = command("explain", folder)

    assert code == 0  # the table still explains the plan
    assert "never seen uint3-c and is left out" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("fit", "RUN", "--metrics", "sqn"),
            "sqn was not measured of plan plan 000; did you mean 'sqnr'?",
        ),
        (("fit", "RUN", "--surrogate", "xgbost"), "did you mean 'xgboost'?"),
        (
            ("fit", "RUN", "--folds", "40"),
            "40 folds need 80 measured plans, so that each holds 2 out; ",
        ),
        (("evaluate", "RUN", "--plans", "4", "--draw", "rndom"), "did you mean 'random'?"),
        (
            ("evaluate", "RUN", "--plans", "4", "--stop", "sqnr"),
            "stopped early by METRIC=VALUE, e.g. sqnr=3; given 'sqnr'",
        ),
        (("evaluate", "RUN", "--given", "nothing.json"), "nothing.json does not exist"),
        (("explain", "RUN", "--plan", "nothing.json"), "nothing.json does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, command: Command, arguments: tuple[str, ...], message: str
) -> None:
    code, shown, said = command(*(folder if a == "RUN" else a for a in arguments))

    assert (code, shown) == (2, "")
    assert message in said.replace("\n", " ")


def test_trials_of_another_graph_are_refused(folder: Path, command: Command) -> None:
    small_graph(width=8).save(folder / "graph.json")
    (folder / "sensitivity.parquet").unlink()

    code, _, said = command("fit", folder)

    assert code == 2
    assert "holds trials of graph" in said


def test_a_run_without_measured_plans_says_how_to_measure_some(
    folder: Path, command: Command
) -> None:
    (folder / "trials.db").unlink()

    code, _, said = command("fit", folder)

    assert code == 2
    assert "--plans 64" in said
    assert not (folder / "trials.db").exists()


def test_two_runs_teach_one_surrogate(folder: Path, tmp_path: Path) -> None:
    other, second = (
        small_study(16, seed=2, graph=small_graph(blocks=2, width=8, model="second")),
        tmp_path / "second",
    )
    config.save(config.Config(model="scenes-unet", folder=second), second / "config.yaml")
    other.graph.save(second / "graph.json")
    other.tables[0].save(second / "sensitivity.parquet")
    trials = Trials(second / "trials.db", other.graph)
    for trial in other.trials:
        trials.add(trial.name, trial.made(other.graph), trial.metrics, "setting")

    asked = FitSettings(metrics=("sqnr",), surrogate="ridge")
    (made,) = fit(Run(config.load(folder / "config.yaml")), asked, also=[second])

    assert set(made.graphs.values()) == {"world", "second"}
    assert made.scores.plans == 32


def test_schemes_of_the_world_are_those_of_its_plans() -> None:
    assert {str(s) for t in small_study(20).trials for s in t.schemes} == set(SCHEMES)


def test_many_plans_are_measured_from_the_shell_and_not_again(
    tmp_path: Path, command: Command
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"a small red ring number {i}" for i in range(8))
    )
    sections = {
        "sampling": {"steps": 2, "batch": 4},
        "profile": {"samples": 2},
        "evaluate": {"samples": 4, "metrics": ["sqnr", "ssim"]},
    }
    content = {
        "model": str(tmp_path / "pipe"),
        "prompts": str(tmp_path / "prompts.txt"),
        "folder": str(tmp_path / "run"),
        **sections,
    }
    config.save(config.parse(content, "a test"), tmp_path / "run" / "config.yaml")
    graph = extract(Run(config.load(tmp_path / "run" / "config.yaml")))

    first, again = (
        command("evaluate", tmp_path / "run", "--plans", count, "--draw", "random")
        for count in (2, 3)
    )

    assert (first[0], again[0]) == (0, 0), first[2] + again[2]
    assert "2 plans measured" in first[2].replace("\n", " ")
    assert "1 plan measured" in again[2].replace("\n", " ")
    found = Trials(tmp_path / "run" / "trials.db", graph).measured()
    assert [trial.name for trial in found] == ["random-0-000", "random-0-001", "random-0-002"]
    assert all(len(trial.samples["ssim"]) == 4 for trial in found)
