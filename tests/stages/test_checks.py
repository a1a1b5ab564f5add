"""Checks before work: metrics against what the pipeline makes, prompts against what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsearch.core.errors import QSearchError
from qsearch.measure.sampling import Sampling
from qsearch.stages.checks import check_run, picture_shape
from qsearch.stages.config import parse
from qsearch.stages.folder import Run


def saved(folder: Path, size: int, *, kind: str = "StableDiffusionPipeline") -> Path:
    """The small files of a pipeline whose latents are a quarter of its pictures' side."""
    files: dict[str, Any] = {
        "model_index.json": {"_class_name": kind},
        "unet/config.json": {"sample_size": size},
        "vae/config.json": {"block_out_channels": [8, 8, 8]},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def run(tmp_path: Path, size: int, **changes: Any) -> Run:
    content = {"model": str(saved(tmp_path / "pipe", size)), "folder": str(tmp_path / "run")}
    return Run(parse(content | changes, "a test"))


def test_the_size_of_pictures_is_read_from_the_pipeline_s_own_files(tmp_path: Path) -> None:
    folder = saved(tmp_path, 16)

    assert picture_shape(folder, Sampling()) == (3, 64, 64)
    assert picture_shape(folder, Sampling(resolution=128)) == (3, 128, 128)
    (folder / "vae" / "config.json").unlink()
    assert picture_shape(folder, Sampling()) is None


def test_the_zoo_s_metrics_fit_the_zoo_s_pictures(tmp_path: Path) -> None:
    check_run(run(tmp_path, 16))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("frechet", r"evaluate\.metrics: frechet goes by a judge of the zoo's scenes of 3x64x64; "),
        ("alignment", r"evaluate\.metrics: alignment of pictures .* name a local folder of a CLIP"),
        ("temporal", r"evaluate\.metrics: temporal compares frames of a video; this pipeline"),
    ],
)
def test_a_metric_that_does_not_fit_the_pictures_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, message: str
) -> None:
    monkeypatch.delenv("QSEARCH_CLIP", raising=False)
    job = run(tmp_path, 128, evaluate={"metrics": ["sqnr", metric]})

    with pytest.raises(QSearchError, match=message):
        check_run(job)

    assert "pipe" not in vars(job)  # no model was loaded
    assert not job.folder.exists()


def test_alignment_of_the_zoo_s_scenes_needs_their_captions(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a ring {i}" for i in range(20)))
    asked = {"samples": 4, "metrics": ["alignment"]}
    job = run(tmp_path, 16, prompts=str(tmp_path / "prompts.txt"), evaluate=asked)

    with pytest.raises(QSearchError, match="alignment needs captions of the zoo's scenes"):
        check_run(job)


def test_too_few_prompts_are_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a ring {i}" for i in range(20)))
    job = run(tmp_path, 16, prompts=str(tmp_path / "prompts.txt"), evaluate={"metrics": ["sqnr"]})

    with pytest.raises(QSearchError, match="holds 20 prompts; profiling and evaluation need 104"):
        check_run(job)


def test_a_metric_of_profiling_is_checked_too(tmp_path: Path) -> None:
    job = run(
        tmp_path, 128, profile={"metrics": ["noise", "frechet"]}, evaluate={"metrics": ["sqnr"]}
    )

    with pytest.raises(QSearchError, match=r"profile\.metrics: frechet goes by a judge"):
        check_run(job)
