"""What is shipped: two pipelines that plain diffusers loads, small, trained, with their records
beside them.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from qsearch import zoo
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Sampling, denoiser_of, example_inputs, record, scene_prompts

MEGABYTES = 12
#: judged alignment that the zoo promises, averaged over attributes, on at least so many captions of
#: held-out scenes
ALIGNMENT, CAPTIONS = 0.9, 512


@pytest.fixture(scope="module", params=zoo.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each pipeline of the zoo."""
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str) -> Any:
    """The pipeline, by plain diffusers."""
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(zoo.folder(name), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def test_plain_diffusers_loads_it_with_no_code_of_ours(name: str, pipe: Any) -> None:
    assert (
        type(pipe).__name__
        == {"scenes-dit": "PixArtAlphaPipeline", "scenes-unet": "StableDiffusionPipeline"}[name]
    )
    parts = {
        type(part).__module__.partition(".")[0]
        for part in pipe.components.values()
        if part is not None
    }
    assert parts == {"diffusers", "transformers"}
    assert not [p.name for p in zoo.folder(name).rglob("*.py")]


def test_it_paints_when_called_as_diffusers_is_called(name: str, pipe: Any) -> None:
    # PixArt's own defaults want a table of resolutions for large pictures and packages that rewrite
    # the prompt.
    plain = (
        {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 36}
        if name == "scenes-dit"
        else {}
    )

    (picture,) = pipe(
        "a small red ring left of a striped blue square",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        **plain,
    ).images

    assert picture.size == (64, 64)
    assert (
        len(
            set(
                picture.getdata()
                if not hasattr(picture, "get_flattened_data")
                else picture.get_flattened_data()
            )
        )
        > 100
    )


def test_it_is_at_most_12_megabytes(name: str) -> None:
    size = sum(p.stat().st_size for p in zoo.folder(name).rglob("*") if p.is_file())

    assert size <= MEGABYTES * 1e6


def test_its_weights_are_finite_and_the_denoiser_s_are_fp16(name: str) -> None:
    broken, types = [], set()
    for path in zoo.folder(name).rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                value = file.get_tensor(key)
                broken += [f"{path.parent.name}/{key}"] if not torch.isfinite(value).all() else []
                types |= {(path.parent.name, value.dtype)} if value.is_floating_point() else set()

    assert broken == []
    denoiser = "transformer" if name == "scenes-dit" else "unet"
    assert {(denoiser, torch.float16), ("vae", torch.float16)} <= types
    assert len([t for t in types if t[0] in (denoiser, "vae")]) == 2


def test_both_share_one_vae() -> None:
    weights = [
        (zoo.folder(n) / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
        for n in zoo.NAMES
    ]

    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def roles(name: str, pipe: Any) -> dict[str, str]:
    """Layer -> role, as `extract` finds them in the denoiser."""
    model = denoiser_of(pipe)
    pipe.to(dtype=torch.float32)
    (call,) = record(pipe, scene_prompts(1, 0), Sampling(steps=2), 1)
    return {layer.name: layer.role for layer in extract(model, example_inputs(call, model))}


def test_the_dit_has_8_blocks_and_the_unet_resnets_and_both_have_both_attentions(
    name: str, pipe: Any, roles: dict[str, str]
) -> None:
    found = set(roles.values())

    assert {
        "self-attention-q",
        "cross-attention-k",
        "feed-forward-in",
        "time-embedding",
        "input",
        "output",
    } <= found
    if name == "scenes-dit":
        assert len(pipe.transformer.transformer_blocks) >= 8
    else:
        assert {"resnet-conv", "resample", "shortcut"} <= found


def test_no_layer_of_the_denoiser_was_left_untrained(pipe: Any) -> None:
    # The recipe starts some output layers at zero; weights that are still all zero never learnt.
    dead = [
        n
        for n, m in denoiser_of(pipe).named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and not m.weight.any()
    ]

    assert dead == []


def states(pipe: Any, texts: list[str]) -> torch.Tensor:
    """Hidden states [N, T, width] of the text encoder."""
    tokens = pipe.tokenizer(
        texts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    with torch.no_grad():
        return pipe.text_encoder.float()(tokens.input_ids)[0]


def test_the_clip_encoder_is_causal_so_its_first_embedding_is_the_same_for_all_prompts(
    name: str, pipe: Any
) -> None:
    found = states(
        pipe,
        [
            "",
            "a red ring left of a blue square",
            "on navy , a large striped star above a white cross",
        ],
    )
    spread = found.std(0).amax(-1)  # of each place, over the prompts

    if name == "scenes-unet":
        assert float(spread[0]) < 1e-5  # fp32 rounding
        assert int(pipe.tokenizer("anything").input_ids[0]) == pipe.tokenizer.bos_token_id
        assert float(spread[1:].min()) > 1e-3
    else:
        assert float(spread[0]) > 1e-3  # T5 looks both ways


def test_every_word_of_a_caption_has_its_own_token(pipe: Any) -> None:
    for text in scene_prompts(200, 3).texts:
        tokens = [
            t for t in pipe.tokenizer(text).input_ids if t not in pipe.tokenizer.all_special_ids
        ]
        assert [pipe.tokenizer.decode([t]) for t in tokens] == text.split()


def read_log(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("part", ["", "vae", "text_encoder"])
def test_recipe_and_loss_lie_beside_the_weights(name: str, part: str) -> None:
    folder = zoo.folder(name) / part
    recipe, log = json.loads((folder / "recipe.json").read_text()), read_log(folder / "loss.csv")

    assert {"name", "steps", "rate", "seed", "batch", "versions"} <= set(recipe)
    steps = [row["step"] for row in log]
    assert steps == sorted(set(steps))
    assert steps[-1] == recipe["steps"]
    tenth = max(1, len(log) // 10)
    assert sum(row["loss"] for row in log[-tenth:]) < sum(row["loss"] for row in log[:tenth])


def test_the_measured_scores_lie_beside_the_weights(name: str) -> None:
    scores = json.loads((zoo.folder(name) / "scores.json").read_text())

    assert scores["samples"] >= CAPTIONS
    assert scores["steps"] == 20
    assert 0 < scores["alignment"] <= 1
    assert 0 < scores["Fréchet"] < 200


def test_both_pipelines_keep_the_promise_of_the_zoo() -> None:
    scores = [json.loads((zoo.folder(name) / "scores.json").read_text()) for name in zoo.NAMES]

    assert min(s[kind] for s in scores for kind in ("alignment", "mean of attributes")) >= ALIGNMENT


def test_an_unknown_name_is_no_folder_of_the_zoo() -> None:
    from qsearch.graphs.families import local
    from qsearch.graphs.families import zoo as family

    assert family.folder("scenes-dti") is None
    assert local.folder("scenes-dti") is None
    assert {family.folder(n) for n in zoo.NAMES} == {zoo.folder(n) for n in zoo.NAMES}
