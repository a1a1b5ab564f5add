"""A run whose config asks for sparse attention: priced, planned within a share of the FLOPs, said,
measured, packed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.stages.allocate import allocate
from qsearch.stages.config import parse
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile
from qsearch.stages.run import run
from tests.models import tiny_pipeline
from tests.stages.test_run import Heard


def content(tmp_path: Path) -> dict[str, object]:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle {i}" for i in range(12)))
    return {
        "model": str(tmp_path / "model"),
        "prompts": str(tmp_path / "prompts.txt"),
        "folder": str(tmp_path / "run"),
        "sampling": {"steps": 4, "guidance": 2.0},
        "profile": {
            "schemes": ["uint4-c", "uint8-c"],
            "attentions": ["window4", "window4~rettention~every2", "dense~cached~every2"],
            "mode": "trajectory",
            "metrics": ["sqnr"],
            "samples": 2,
            "probes": 2,
        },
        "allocate": {"metric": "sqnr", "average_bits": 6.0, "attention_share": 0.7, "steps": 2},
        "evaluate": {"samples": 3, "metrics": ["sqnr"], "random": 1},
    }


def test_a_config_s_attentions_are_planned_measured_and_shown(tmp_path: Path) -> None:
    given = parse(content(tmp_path), "config.yaml")

    run(given)

    folder = tmp_path / "run"
    plan = Plan.load(folder / "plan.json", OpGraph.load(folder / "graph.json"))
    assert plan.achieved.attention_share <= 0.7 and plan.achieved.average_bits <= 6.0
    assert any(name.endswith(":attention") for name in plan.sites)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {"plan", "random"} <= {row["plan"] for row in rows}
    page = (folder / "report.html").read_text()
    assert "attentions are computed in another way" in page and "attention FLOPs" in page


def allocated(given: dict[str, object], heard: Heard) -> Plan:
    job = Run(parse(given, "config.yaml"), heard)
    graph = extract(job)
    return allocate(job, graph, profile(job, graph))


def test_a_schedule_is_searched_and_is_no_worse_than_one_setting(tmp_path: Path) -> None:
    given = content(tmp_path)
    given["allocate"] = {
        "metric": "sqnr", "average_bits": 6.0, "attention_share": 0.7, "schedule": 16
    }  # fmt: skip
    heard = Heard()

    made = allocated(given, heard)

    assert made.achieved.attention_share <= 0.7 and made.achieved.average_bits <= 6.0
    assert made.budget is not None and made.budget.attention_share == 0.7
    after, before = map(
        float,
        re.findall(r"final latents ([0-9.]+) dB; the best single setting has ([0-9.]+)",
                   " ".join(heard.lines))[0],
    )  # fmt: skip
    assert after >= before
    assert made.solver is not None and made.solver.name == "ilp, schedule"
    assert allocated(given, heard) == made
    assert "allocate: plan.json is up to date" in heard.lines


@pytest.mark.parametrize(
    ("section", "key", "value", "wrong"),
    [
        ("allocate", "schedule", 8, "leave steps out, or schedule"),
        ("profile", "attentions", ["window"], "profile.attentions: .*dense or KINDN"),
        ("allocate", "attention_share", 0.0, "above zero; attention_share is 0"),
    ],
)
def test_a_config_says_what_is_wrong_with_its_attentions(
    tmp_path: Path, section: str, key: str, value: object, wrong: str
) -> None:
    given = content(tmp_path)
    given[section] = {**given[section], key: value}  # type: ignore[dict-item]

    with pytest.raises(QSearchError, match=wrong):
        parse(given, "config.yaml")


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"allocate": {"schedule": 4}}, "within `attention_share` or `total_bit_operations`"),
        ({"allocate": {"schedule": 4, "attention_share": 0.5, "refine": 2}}, "leave refine out"),
        (
            {"allocate": {"schedule": 4, "attention_share": 0.5}, "profile": {"attentions": []}},
            "chooses among profile.attentions; there are none",
        ),
    ],
)
def test_a_schedule_that_nothing_limits_is_refused(
    tmp_path: Path, changes: dict[str, object], wrong: str
) -> None:
    with pytest.raises(QSearchError, match=wrong):
        parse(content(tmp_path) | changes, "config.yaml")
