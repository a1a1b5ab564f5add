"""A run whose config asks for sparse attention: priced, planned within a share of the FLOPs, said,
measured, packed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.stages.config import parse
from qsearch.stages.run import run
from tests.models import tiny_pipeline


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


@pytest.mark.parametrize(
    ("section", "key", "value", "wrong"),
    [
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
