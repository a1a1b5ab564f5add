"""What is shipped of the multistage model: small, whole, with its records, and as good as
promised.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from qsearch import zoo
from qsearch.measure.pipelines import Sampling, decode, sample, scene_prompts
from qsearch.zoo import judge
from qsearch.zoo.ecar.pipeline import EcarPipeline

FOLDER = zoo.folder("scenes-ecar")
MEGABYTES = 12
#: judged alignment that is promised, averaged over attributes, on so many held-out captions
ALIGNMENT, CAPTIONS = 0.9, 512


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The shipped pipeline, by its own class."""
    found = EcarPipeline.from_pretrained(FOLDER, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def test_it_is_at_most_12_megabytes_and_names_no_place_of_its_training() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file()]

    assert sum(p.stat().st_size for p in files) <= MEGABYTES * 1e6
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix == ".json"]
    assert [t for t in texts if '"/' in t] == []


def test_its_weights_are_finite_and_the_networks_are_fp16() -> None:
    broken, types = [], set()
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                value = file.get_tensor(key)
                broken += [f"{path.parent.name}/{key}"] if not torch.isfinite(value).all() else []
                types.add((path.parent.name, value.dtype))

    assert broken == []
    halves = {(part, torch.float16) for part in ("transformer", "flow", "vae")}
    assert types == {*halves, ("text_encoder", torch.float32)}


def test_it_shares_the_vae_of_the_zoo_and_no_layer_was_left_untrained(pipe: Any) -> None:
    name = "diffusion_pytorch_model.safetensors"
    ours, theirs = (f / "vae" / name for f in (FOLDER, zoo.folder("scenes-dit")))
    assert ours.read_bytes() == theirs.read_bytes()

    parts = [m for part in (pipe.transformer, pipe.flow) for m in part.modules()]
    layers = [m for m in parts if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) > 50
    assert [m for m in layers if not m.weight.any()] == []


def test_recipe_loss_and_scores_lie_beside_the_weights() -> None:
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    scores = json.loads((FOLDER / "scores.json").read_text())
    with (FOLDER / "loss.csv").open(newline="") as file:
        log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    assert log[-1]["step"] == recipe["steps"]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert scores["samples"] >= CAPTIONS
    assert min(scores["alignment"], scores["mean of attributes"]) >= ALIGNMENT


def test_it_paints_what_captions_say(pipe: Any) -> None:
    prompts = scene_prompts(24, 11)

    latents = sample(pipe, prompts, Sampling(steps=12, batch=24))
    aligned = judge.alignment(judge.load_judge(), decode(pipe, latents), prompts.captions)

    assert float(aligned.mean()) >= 0.8  # 24 captions have a standard error of 0.02
