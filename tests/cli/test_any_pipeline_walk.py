"""Pipelines of unusual shape through the verbs: Wan 2.2 has two denoisers, Z-Image takes and
returns lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from tests.conftest import Command
from tests.tiny_pipelines import build

SIZES = {
    "wan_22": {"height": 16, "width": 16, "num_frames": 5},
    "z_image": {"height": 32, "width": 32},
}


@pytest.mark.parametrize("name", [pytest.param("wan_22", marks=pytest.mark.slow), "z_image"])
def test_every_verb_carries_out_a_plan(name: str, tmp_path: Path, command: Command) -> None:
    build(name).save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(f"red circle {i}" for i in range(8)))
    run = tmp_path / "run"
    run.mkdir()
    content: dict[str, Any] = {
        "model": str(tmp_path / "pipe"),
        "prompts": str(tmp_path / "prompts.txt"),
        "sampling": {"steps": 4, "guidance": 3.0, "call": SIZES[name]},
        "profile": {"schemes": ["int4-c", "int8-c"], "bins": 2, "samples": 2, "probes": 2},
        "allocate": {"average_bits": 6.5},
        "evaluate": {"samples": 3, "metrics": ["sqnr"], "uniform": "int4-c"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(content))

    for arguments in (
        ("profile", run),
        ("allocate", run),
        ("evaluate", run),
        ("apply", run),
        ("export", run, "--to", "gguf", "--nearest"),
    ):
        code, out, err = command(*arguments)
        assert code == 0, f"{arguments[0]}: {out} {err}"

    graph = OpGraph.load(run / "graph.json")
    plan = Plan.load(run / "plan.json", graph)
    assert {str(scheme) for (scheme,) in plan.choices.values()} >= {"int4-c", "int8-c"}
    parts = graph.components or ("",)
    assert len(parts) == (2 if name == "wan_22" else 1)
    for part in parts:
        assert (run / "export-gguf" / part / "model.gguf").is_file()
    code, _, err = command("export", run, "--to", "gguf", "--nearest")
    assert code == 2
    assert "exists and would be overwritten" in err
