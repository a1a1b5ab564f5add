"""A walk through the verbs on a small pipeline of one's own: each begins where the one before
ended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials
from qsearch.stages import config
from tests.conftest import Command
from tests.models import tiny_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, prompts and a config that names both by relative paths."""
    place = tmp_path_factory.mktemp("walk")
    tiny_pipeline().save_pretrained(place / "pipe")
    lines = [f"a small red ring number {i}" for i in range(12)]
    (place / "prompts.txt").write_text("\n".join(lines))
    content: dict[str, Any] = {
        "model": "pipe",
        "prompts": "prompts.txt",
        "folder": "run",
        "sampling": {"steps": 2, "batch": 4, "guidance": 3.0},
        "profile": {
            "schemes": ["uint2-c@gptq", "uint4-c@gptq", "uint8-c"],
            "bins": 1,
            "samples": 2,
            "batch": 1,
            "probes": 2,
        },
        "calibrate": {"bins": 1},
        "allocate": {"average_bits": 6.0},
        "evaluate": {"samples": 4, "metrics": ["sqnr", "ssim"]},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(content))
    return place


@pytest.fixture(scope="module")
def ran(place: Path) -> Path:
    """The run's folder after `qsearch run mine.yaml`."""
    from qsearch.stages.run import run

    rows = run(place / "mine.yaml")

    assert [row["plan"] for row in rows] == ["full precision", "uniform uint4-c", "plan", "random"]
    return place / "run"


def test_a_run_of_one_s_own_ends_with_a_page_and_no_paths_of_the_machine_in_it(ran: Path) -> None:
    page = (ran / "report.html").read_text(encoding="utf-8")

    assert str(ran.parent) not in page
    assert OpGraph.load(ran / "graph.json").model == "pipe"


def test_run_works_on_the_folder_and_does_nothing_twice(ran: Path, command: Command) -> None:
    code, shown, said = command("run", ran)

    assert code == 0, said
    for stage in ("extract", "profile", "allocate", "report"):
        assert f"{stage}: " in said
    assert said.count("up to date") == 4
    assert "every plan was measured before" in said
    assert "plan" in shown


def test_another_guidance_is_another_graph(ran: Path, command: Command) -> None:
    first = OpGraph.load(ran / "graph.json")
    assert command("set", ran, "sampling.guidance=1.0")[0] == 0

    from qsearch.stages.extract import extract
    from qsearch.stages.folder import Run

    alone = extract(Run(config.load(ran)))
    assert command("set", ran, "sampling.guidance=3.0")[0] == 0
    both = extract(Run(config.load(ran)))

    assert both.total_macs == first.total_macs
    assert alone.total_macs < 0.75 * first.total_macs


def test_many_plans_that_are_calibrated_are_measured_fitted_and_explained(
    ran: Path, command: Command
) -> None:
    code, _, said = command("evaluate", ran, "--plans", 6)
    assert code == 0, said
    assert "6 plans measured" in said.replace("\n", " ")

    code, shown, said = command("fit", ran, "--surrogate", "ridge", "--folds", 3)
    assert code == 0, said
    assert "sqnr" in shown
    assert config.load(ran).fit.surrogate != "ridge"  # options hold for one call

    code, shown, said = command("explain", ran, "--top", 2)
    assert code == 0, said
    assert (ran / "attribution.parquet").is_file()


def test_the_trials_of_a_run_are_values_with_directions(ran: Path) -> None:
    url = f"sqlite:///{ran / 'trials.db'}"

    [study] = [
        optuna.load_study(study_name=name, storage=url)
        for name in optuna.get_all_study_names(url)
        if "noise-" in name
    ]

    assert dict(zip(study.metric_names or [], (d.name for d in study.directions), strict=True)) == {
        "noise": "MINIMIZE",
        "sqnr": "MAXIMIZE",
        "ssim": "MAXIMIZE",
    }
    assert len(study.get_trials()) == 4
    assert len(Trials(ran / "trials.db", OpGraph.load(ran / "graph.json")).all()) >= 4


def test_a_plan_given_as_the_run_s_own_is_measured_and_explained(
    ran: Path, command: Command
) -> None:
    code, _, said = command("evaluate", ran, "--given", ran / "plan.json")
    assert code == 0, said

    assert command("fit", ran, "--surrogate", "ridge", "--folds", 2)[0] == 0
    code, _, said = command("explain", ran)

    assert code == 0, said


def test_a_plan_is_packed_from_the_shell(ran: Path, command: Command) -> None:
    code, _, said = command("apply", ran)

    assert code == 0, said
    assert (ran / "model.safetensors").is_file()


def test_an_option_that_is_refused_leaves_the_config_as_it_was(ran: Path, command: Command) -> None:
    before = (ran / "config.yaml").read_bytes()

    code, _, said = command("allocate", ran, "--average-bits", 0.5)

    assert (code, "no plan reaches average_bits 0.5" in said) == (2, True)
    assert (ran / "config.yaml").read_bytes() == before


def test_an_interrupted_stage_keeps_its_question(
    ran: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsearch.stages import profile

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "profile", interrupted)
    code, _, said = command("profile", ran, "--probes", 3)

    assert code == 130
    assert "what was finished is kept in" in said
    assert "the same command goes on" in said
    monkeypatch.undo()
    monkeypatch.setattr(profile, "profile", lambda job, *_: asked.append(job.config.profile.probes))
    asked: list[int] = []
    code, _, said = command("profile", ran)
    assert (code, asked) == (0, [3]), said
    assert "goes on as it was asked before it was interrupted: probes 3" in " ".join(said.split())
    assert command("profile", ran)[0] == 0
    assert asked == [3, 2]  # it was finished, and the config's holds again
    assert config.load(ran).profile.probes == 2


def test_limits_are_taken_back_from_the_shell(ran: Path, command: Command) -> None:
    assert command("set", ran, "allocate.formats=1", "allocate.average_bits=")[0] == 0
    assert config.load(ran).allocate.budget.content() == {"average_bits": 4.0}
    assert config.load(ran).allocate.formats == 1

    assert command("set", ran, "allocate.formats=", "allocate.average_bits=6.0")[0] == 0
    assert config.load(ran).allocate.formats is None


def test_an_imported_plan_is_kept_by_run(ran: Path, command: Command) -> None:
    graph = OpGraph.load(ran / "graph.json")
    own = (ran / "plan.json").read_bytes()
    Plan.uniform(graph, "uint8-c").save(ran / "plan.json")

    code, _, said = command("run", ran)

    assert code == 0, said
    assert "was imported or edited by hand, and is kept" in " ".join(said.split())
    assert set(json.loads((ran / "plan.json").read_text())["sites"].values()) <= {"uint8-c", "keep"}
    (ran / "plan.json").write_bytes(own)
