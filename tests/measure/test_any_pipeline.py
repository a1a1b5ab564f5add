"""Any pipeline: diffusers' own classes, saved to a folder and loaded again, are recorded and
probed, step by step and through their own loops.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsearch.cli import commands
from qsearch.cli.common import place_for
from qsearch.core.errors import QSearchError
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
)
from qsearch.measure.profiling import profile
from qsearch.measure.trajectory import trajectories
from tests.tiny_pipelines import BUILDERS, build

PROMPTS = Prompts(("a red circle", "two blue squares"))
SAMPLING = Sampling(steps=2, guidance=3.0, resolution=32)
VIDEO = Sampling(steps=2, guidance=3.0, resolution=16, frames=5)


def never_moved(table: SensitivityTable) -> list[str]:
    """Layers for which every choice is free."""
    worst = table.frame.groupby("site")["estimate"].max()
    return sorted(worst[worst == 0].index)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_pipeline_is_probed_step_by_step_and_through_its_own_loop(
    name: str, tmp_path: Path
) -> None:
    build(name).save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path)
    video = name in ("cogvideox", "wan_22")
    model, sampling = model_of(pipe), VIDEO if video else SAMPLING

    calls = record(pipe, PROMPTS, sampling, bins=1, batch=1)
    graph = extract(model, example_inputs(calls[0], model))
    assert len(calls) == (8 if name == "wan_22" else 2)  # two denoisers, two calls a step
    assert [call.unsampled for call in calls if call.sampled is None] == []  # what each predicts

    settings: dict[str, Any] = {"estimator": "probe", "probes": 2, "pipe": pipe}
    seen = ["noise", "sqnr", "temporal"] if video else ["noise", "sqnr"]
    steps = profile(model, graph, ["uint4-c"], calls, metrics=seen, **settings)
    whole = profile(
        model,
        graph,
        ["uint4-c"],
        trajectories(pipe, PROMPTS[:1], sampling),
        metrics=["sqnr"],
        **settings,
    )

    wanted = {layer.name for layer in graph.quantizable}
    assert steps.metrics == sorted(seen)
    for table in (steps, whole):
        assert set(table.frame["site"]) == wanted
        assert np.isfinite(table.frame["estimate"]).all()
        assert len(never_moved(table)) <= 0.1 * len(wanted), never_moved(table)
    assert whole.responses is not None
    per_step = np.abs(whole.responses.values["sqnr", 0]).max((0, 2, 3))
    assert per_step.shape == (2,)
    assert (per_step > 0).all()


def test_a_folder_and_a_file_of_prompts_are_all_that_the_command_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("stable_diffusion").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS.texts))
    run = tmp_path / "run"
    few = [
        "--schemes",
        "uint4-c",
        "--estimator",
        "probe",
        "--metrics",
        "noise,sqnr",
        "--probes",
        "2",
        "--samples",
        "2",
        "--bins",
        "1",
        "--batch",
        "1",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "qsearch",
            "profile",
            str(tmp_path / "model"),
            "-o",
            str(run),
            "--prompts",
            str(tmp_path / "prompts.txt"),
            *few,
        ],
    )

    with pytest.raises(SystemExit, match="0"):
        commands.main()

    table = SensitivityTable.load(run / "sensitivity.parquet")
    assert table.metrics == ["noise", "sqnr"]
    assert table.responses is not None
    assert {p.name for p in run.iterdir()} - {"log.txt"} == {
        "config.yaml",
        "graph.json",
        "sensitivity.parquet",
    }
    with pytest.raises(
        QSearchError,
        match=r"is a run of .*model, not of scenes-dit; give another folder with --output",
    ):
        place_for("scenes-dit", run)
