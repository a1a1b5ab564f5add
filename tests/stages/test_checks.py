"""Checks before work: metrics against what the pipeline makes, prompts against what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qsearch.core.errors import QSearchError
from qsearch.measure.own import own_of
from qsearch.measure.sampling import SamplingSettings
from qsearch.stages.announce import settings_lines
from qsearch.stages.checks import check_run, picture_shape
from qsearch.stages.config import parse
from qsearch.stages.folder import Run
from tests.tiny_pipelines import build


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
    assert picture_shape(run(tmp_path, 16)) == (3, 64, 64)
    assert picture_shape(run(tmp_path, 16, sampling={"resolution": 128})) == (3, 128, 128)
    assert picture_shape(run(tmp_path, 16, sampling={"height": 96})) == (3, 96, 64)
    job = run(tmp_path, 16)
    (tmp_path / "pipe" / "vae" / "config.json").unlink()
    assert picture_shape(job) is None


def test_the_zoo_s_metrics_fit_the_zoo_s_pictures(tmp_path: Path) -> None:
    job = Run(parse({"model": "scenes-dit", "folder": str(tmp_path)}, "a test"))

    check_run(job)

    assert job.metrics == ("sqnr", "ssim", "frechet", "alignment")
    assert (job.samples, job.sampling.steps, job.sampling.guidance) == (96, 20, 4.0)
    assert job.sampling.batch == 16


def test_a_model_of_one_s_own_has_its_class_s_defaults_and_metrics_that_its_pictures_can_have(
    tmp_path: Path,
) -> None:
    job = run(tmp_path, 64)

    check_run(job)

    assert (job.sampling.steps, job.sampling.guidance) == (50, 7.5)
    assert (job.metrics, job.samples) == (("sqnr", "ssim"), 8)
    assert job.prompts(8, part=0).texts != job.prompts(8, part=1).texts


def test_what_was_chosen_is_said_in_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a ring {i}" for i in range(4)))
    job = run(tmp_path, 64, prompts=str(tmp_path / "prompts.txt"), sampling={"steps": 5})

    model, profile, evaluate = settings_lines(job, "profile", "evaluate")

    assert model == (
        "pipe: 5 steps, guidance 7.5*, 256x256*, float32 on cpu (*: the pipeline's own)"
    )
    assert "8 samples of 2 prompts of prompts.txt, in turn" in profile
    assert "3 samples of 2 prompts of" in evaluate


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("stable_diffusion_xl", (50, 5.0, (16, 16), "pictures")),
        ("stable_diffusion_3", (28, 7.0, None, "pictures")),
        ("flux", (28, 3.5, (256, 256), "pictures")),
        ("wan_22", (50, 5.0, (480, 832), "videos")),
        ("sana", (20, 4.5, (1024, 1024), "pictures")),
    ],
)
def test_steps_guidance_and_size_are_those_of_class_and_scheduler(
    name: str, own: tuple[Any, ...], tmp_path: Path
) -> None:
    build(name).save_pretrained(tmp_path / "pipe")

    found = own_of(tmp_path / "pipe")

    assert (found.steps, found.guidance, found.makes) == (own[0], own[1], own[3])
    assert own[2] is None or found.size == own[2]


@pytest.mark.parametrize(
    ("kind", "asked", "words"),
    [
        ("DDPMPipeline", {"steps": 3, "guidance": 2.0}, "takes no guidance; leave sampling.guid"),
        ("LTXLatentUpsamplePipeline", {"steps": 3}, "takes no steps; leave sampling.steps out"),
        ("DDPMPipeline", {"steps": 3}, ""),
        ("SomebodysPipeline", {"steps": 3, "guidance": 2.0}, ""),
    ],
)
def test_steps_and_guidance_that_a_call_does_not_take_are_refused(
    kind: str, asked: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    found, settings = own_of(tmp_path), SamplingSettings(**asked)

    if words:
        with pytest.raises(QSearchError, match=words):
            found.sampler(settings)
    else:
        assert found.sampler(settings).steps == 3


def test_a_component_without_weights_is_said_before_any_work(tmp_path: Path) -> None:
    job = run(tmp_path, 16)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}
    (job.model_folder / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(QSearchError, match="unet has no weights"):
        check_run(job)


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (15, ""),
        (20001, "profile: clips of 20001 frames of 64x64 take 37 GB or more, and there are 8; "),
        (10001, "evaluate: clips of 10001 frames of 64x64 take 16 GB or more, and there are 8; "),
    ],
)
def test_a_clip_too_long_for_the_memory_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, said: str
) -> None:
    content = {
        "model": "scenes-video",
        "folder": str(tmp_path),
        "sampling": {"frames": frames},
        "profile": {"batch": 1, "checkpointing": said.startswith("evaluate")},
        "evaluate": {"samples": 16},
    }
    job = Run(parse(content, "a test"))
    monkeypatch.setattr("qsearch.measure.sizes.total_memory", lambda: 8 * 10**9)

    if not said:
        check_run(job)
        return
    with pytest.raises(QSearchError, match=said):
        check_run(job)


def test_weights_that_can_t_fit_the_memory_are_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run(tmp_path, 16, offload="none")
    save_file({"w": torch.zeros(64, 64)}, job.model_folder / "unet" / "model.safetensors")
    monkeypatch.setattr("qsearch.measure.sizes.free_memory", lambda: 10_000)
    monkeypatch.setattr("qsearch.measure.sizes.total_memory", lambda: 12_000)

    with pytest.raises(QSearchError, match=r"--dtype bfloat16, which takes half"):
        check_run(job)


def test_a_prompts_file_that_is_a_picture_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")

    with pytest.raises(QSearchError, match="must be a text file in UTF-8"):
        check_run(run(tmp_path, 16, prompts=str(tmp_path / "prompts.txt")))


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
    job = run(tmp_path, 16, prompts=str(tmp_path / "prompts.txt"), evaluate={"samples": 96})

    with pytest.raises(QSearchError, match="holds 20 prompts; profiling and evaluation need 104"):
        check_run(job)


def test_a_metric_of_profiling_is_checked_too(tmp_path: Path) -> None:
    job = run(
        tmp_path, 128, profile={"metrics": ["noise", "frechet"]}, evaluate={"metrics": ["sqnr"]}
    )

    with pytest.raises(QSearchError, match=r"profile\.metrics: frechet goes by a judge"):
        check_run(job)
