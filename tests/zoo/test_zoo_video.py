"""The zoo's video pipeline: plain diffusers loads it, small, trained, with its records beside
it.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
import torch

from qsearch import zoo
from qsearch.graphs.extraction import extract
from qsearch.measure.own import own_of
from qsearch.measure.pipelines import denoiser_of, example_inputs, record, scene_prompts
from qsearch.measure.sampling import SamplingSettings

MEGABYTES = 14
FOLDER = zoo.folder("scenes-video")


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The pipeline, by plain diffusers."""
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def test_plain_diffusers_loads_it_with_no_code_of_ours(pipe: Any) -> None:
    assert type(pipe).__name__ == "WanPipeline"
    names = {n: type(part).__name__ for n, part in pipe.components.items() if part is not None}
    assert names["transformer"] == "WanTransformer3DModel"
    assert names["vae"] == "AutoencoderKLWan"
    assert names["text_encoder"] == "UMT5EncoderModel"
    assert not [p.name for p in FOLDER.rglob("*.py")]


def test_it_makes_a_clip_when_called_as_diffusers_is_called(pipe: Any) -> None:
    frames, height, width = zoo.CLIP

    made = pipe(
        "a small red ring moving left , fast , above a still blue square",
        num_inference_steps=2,
        num_frames=frames,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames

    assert made.shape == (1, frames, 3, height, width)
    assert made.std() > 0.02


def test_it_attends_to_512_tokens_of_eight_latent_frames_at_once(pipe: Any) -> None:
    prompts = scene_prompts(1, 0, moving=True)
    sampling = own_of(FOLDER).sampler(SamplingSettings(steps=2, guidance=1.0))

    (call,) = record(pipe, prompts, sampling, 1)

    latents = call.kwargs["hidden_states"]
    assert latents.shape[-3:] == (8, 16, 16)
    graph = extract(denoiser_of(pipe), example_inputs(call, denoiser_of(pipe)))
    layer = graph.layer("blocks.0.attn1.to_q")
    assert layer.inputs == 512 * layer.weight_shape[1]
    assert {"self-attention-q", "cross-attention-k"} <= {x.role for x in graph}


def test_it_is_small() -> None:
    size = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())

    assert size <= MEGABYTES * 1e6


def test_its_records_say_how_it_was_trained_and_how_well_it_does() -> None:
    recipe = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))
    scores = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))
    with (FOLDER / "loss.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]

    assert recipe["name"] == "scenes-video"
    assert recipe["begun from"].startswith("single frames")
    assert losses[-1] < losses[0]
    assert {"alignment", "motion", "Fréchet"} <= set(scores)
