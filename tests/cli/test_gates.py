"""Gates from the shell: plans that pass and that fail, exit codes, and the smallest plan that
passes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.core.errors import QSearchError
from qsearch.core.gates import Gate, failures
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials
from qsearch.stages import config
from tests.conftest import Command
from tests.models import tiny_pipeline


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small pipeline with a gate that any plan keeps."""
    from qsearch.stages.run import run

    place = tmp_path_factory.mktemp("gates")
    tiny_pipeline().save_pretrained(place / "pipe")
    lines = [f"a small red ring number {i}" for i in range(12)]
    (place / "prompts.txt").write_text("\n".join(lines))
    content: dict[str, Any] = {
        "model": "pipe",
        "prompts": "prompts.txt",
        "folder": "run",
        "sampling": {"steps": 2, "batch": 4, "guidance": 3.0},
        "profile": {
            "schemes": ["uint2-c", "uint4-c", "uint8-c"],
            "bins": 1,
            "samples": 2,
            "batch": 1,
            "probes": 2,
        },
        "allocate": {"average_bits": 6.0},
        "evaluate": {"samples": 4, "metrics": ["sqnr", "psnr"], "uniform": None, "random": 0},
        "gates": {"psnr": ">= 1"},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(content))
    run(place / "mine.yaml")
    return place / "run"


def sqnr_of(folder: Path) -> float:
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    return float(next(row["metrics"]["sqnr"][0] for row in rows if row["plan"] == "plan"))


def test_a_plan_that_passes_exits_with_0_and_one_that_fails_with_3(
    ran: Path, command: Command
) -> None:
    measured = sqnr_of(ran)

    passes = command("evaluate", ran)
    assert command("set", ran, f"gates.sqnr=>= {measured + 1:.2f}")[0] == 0
    fails = command("evaluate", ran)

    assert passes[0] == 0
    assert "gates kept: psnr >= 1" in passes[2]
    assert fails[0] == 3
    assert "PSNR" in fails[1]  # the table comes first
    last = fails[2].strip().splitlines()[-1]
    assert last.startswith(f"qsearch: the plan fails: sqnr is {measured:.4g}")
    assert command("run", ran)[0] == 3
    assert command("set", ran, f"gates.sqnr=>= {measured - 1:.2f}")[0] == 0
    assert command("run", ran)[0] == 0


@pytest.mark.slow
def test_the_smallest_plan_that_passes_is_found_by_eight_measurements(
    ran: Path, command: Command
) -> None:
    assert command("set", ran, f"gates.sqnr=>= {sqnr_of(ran) - 4:.2f}")[0] == 0

    code, _, said = command("allocate", ran, "--passing")

    assert code == 0, said
    graph = OpGraph.load(ran / "graph.json")
    plan = Plan.load(ran / "plan.json", graph)
    trials = [t for t in Trials(ran / "trials.db", graph).all() if t.name.startswith("gate ")]
    gate = Gate.parse("sqnr", config.load(ran / "config.yaml").gates["sqnr"])
    assert 2 <= len(trials) <= 8
    passing = [t for t in trials if gate.passes(t.metrics["sqnr"][0])]
    smaller = [t for t in trials if t.average_bits < plan.achieved.average_bits]
    assert plan.id in {t.plan for t in passing}
    assert not any(gate.passes(t.metrics["sqnr"][0]) for t in smaller)
    assert config.load(ran / "config.yaml").allocate.average_bits == pytest.approx(
        plan.budget.average_bits if plan.budget else 0
    )
    assert command("evaluate", ran)[0] == 0
    count = len(Trials(ran / "trials.db", graph).all())
    assert command("allocate", ran, "--passing")[0] == 0
    assert len(Trials(ran / "trials.db", graph).all()) == count  # nothing is measured twice


def test_gates_that_nothing_can_keep_leave_the_run_as_it_was(ran: Path, command: Command) -> None:
    assert command("set", ran, "gates.sqnr=>= 500")[0] == 0
    before = {name: (ran / name).read_bytes() for name in ("plan.json", "config.yaml")}

    code, _, said = command("allocate", ran, "--passing")

    assert code == 3
    assert "stored bits a weight pass: sqnr is" in said.splitlines()[-1]
    assert before == {name: (ran / name).read_bytes() for name in before}


@pytest.mark.parametrize(
    ("metric", "text", "message"),
    [
        ("lpips", "0.15", r"a gate is a metric and a limit, such as lpips: '<= 0.15'"),
        ("lpips", "< 0.15", r"a gate is a metric and a limit"),
        ("lpips", ">= 0.15", r"lpips is better below a limit: write lpips: '<= 0.15'"),
        ("psnr", "<= 30", r"psnr is better above a limit: write psnr: '>= 30'"),
    ],
)
def test_a_gate_that_can_t_be_meant_is_refused(metric: str, text: str, message: str) -> None:
    with pytest.raises(QSearchError, match=message):
        Gate.parse(metric, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": {"lipps": "<= 0.1"}}, "did you mean 'lpips'?"),
        ({"gates": {"ssim": "0.9"}}, "a gate is a metric and a limit"),
        (
            {"gates": {"ssim": ">= 0.9"}, "evaluate": {"metrics": ["sqnr"]}},
            "ssim is not among evaluate.metrics, sqnr; add it there",
        ),
    ],
)
def test_gates_of_a_config_are_checked_when_it_is_read(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(QSearchError, match="gates") as caught:
        config.parse({"model": "scenes-dit", **changes}, "mine.yaml")

    assert message in str(caught.value)


def test_a_value_that_is_no_number_keeps_no_gate_and_one_not_measured_is_said() -> None:
    gate = Gate.parse("sqnr", ">= 3")

    assert failures([gate], {"sqnr": (float("nan"), 0.0)})
    with pytest.raises(QSearchError, match="sqnr was not measured; measured are ssim"):
        failures([gate], {"ssim": (0.9, 0.1)})
