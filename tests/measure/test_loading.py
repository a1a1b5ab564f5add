"""Loading: types, variants and layerwise casting; what is measured of a cast denoiser is what the
same weights in fp32 give.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from qsearch.core.errors import QSearchError
from qsearch.measure.loading import load_pipeline, only_variant, variants_of
from qsearch.measure.noise import relative_noise
from qsearch.measure.own import named_parts
from qsearch.measure.pipelines import Prompts, Sampling, denoiser_of, record, run, sample
from qsearch.zoo.painters import new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_pipelines import build

PROMPTS = Prompts(("a red square", "a blue circle"))
SAMPLING = Sampling(steps=2)
#: squared relative error of bf16 arithmetic through a few layers
BF16 = 1e-3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build("pixart_sigma").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float8_e4m3fn", torch.float8_e4m3fn),
    ],
)
def test_a_pipeline_in_another_type_is_recorded_and_run(
    saved: Path, name: str, stored: torch.dtype
) -> None:
    pipe = load_pipeline(saved, dtype=name)
    model: Any = denoiser_of(pipe)

    assert model.transformer_blocks[0].ff.net[2].weight.dtype == stored
    calls = record(pipe, PROMPTS, SAMPLING, 2)
    outputs = [run(model, call) for call in calls]

    assert {o.dtype for o in outputs} == {torch.float32}
    assert torch.equal(run(model, calls[0]), outputs[0])
    whole = load_pipeline(saved)
    plain: Any = denoiser_of(whole)
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    wanted = run(plain, record(whole, PROMPTS, SAMPLING, 2)[0])
    assert relative_noise(outputs[0], wanted)[0] < (1e-9 if name == "float32" else 10 * BF16)


def test_a_part_that_the_folder_names_as_left_out_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {
        "unet": tiny.unet(cross_attention_dim=tiny.WIDTH, attention_head_dim=2),
        "vae": tiny.vae(),
        "text_encoder": tiny.clip(),
        "tokenizer": new_tokenizer(causal=True),
        "scheduler": DDIMScheduler(),
    }
    # its class has no parts that it calls optional, and diffusers loads it only where it is told
    tiny.pipeline("TextToVideoZeroPipeline", parts).save_pretrained(tmp_path)

    pipe = load_pipeline(tmp_path)

    assert pipe.safety_checker is None
    assert torch.equal(pipe.unet.conv_in.weight, parts["unet"].conv_in.weight)


@pytest.mark.parametrize(
    ("kind", "held", "parts"),
    [
        (
            "Krea2Pipeline",
            {"vae": ["diffusers", "A"], "text_encoder_select_layers": [2, 5], "is_distilled": True},
            {"vae": ("diffusers", "A")},
        ),
        (
            "LongCatAudioDiTPipeline",
            {"vae": ["diffusers", "A"], "scheduler": ["diffusers", "FlowMatchEuler"]},
            {"vae": ("diffusers", "A")},
        ),
        (
            "StableDiffusionPipeline",
            {"safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"]},
            {"safety_checker": (None, None), "scheduler": ("diffusers", "DDIMScheduler")},
        ),
        ("Mine", {"unet": ["mine", "Net"], "sizes": ["a", "b", "c"]}, {"unet": ("mine", "Net")}),
    ],
    ids=["settings", "made by the class", "left out", "an unknown class"],
)
def test_settings_of_a_pipeline_are_not_taken_for_its_parts(
    tmp_path: Path, kind: str, held: dict[str, Any], parts: dict[str, Any]
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, **held}))

    assert named_parts(tmp_path) == parts


def test_an_unknown_type_is_answered_with_the_nearest(saved: Path) -> None:
    with pytest.raises(QSearchError, match="given 'float8_e4m3'; did you mean 'float8_e4m3fn'"):
        load_pipeline(saved, dtype="float8_e4m3")


def test_files_of_one_variant_alone_are_taken(saved: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(saved)
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert variants_of(tmp_path / "fp16")["transformer"] == {"fp16"}
    assert only_variant(tmp_path / "fp16") == "fp16"
    assert only_variant(saved) is None

    loaded = load_pipeline(tmp_path / "fp16")

    assert torch.equal(sample(loaded, PROMPTS, SAMPLING), sample(pipe, PROMPTS, SAMPLING))


def test_several_variants_without_plain_files_want_a_word(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(saved, folder)
    own = next((folder / "transformer").glob("*.safetensors"))
    for variant in ("fp16", "ema"):
        shutil.copy(own, own.with_name(f"{own.stem}.{variant}.safetensors"))
    own.unlink()

    with pytest.raises(QSearchError, match="the variants ema, fp16: say which"):
        load_pipeline(folder)
    assert load_pipeline(folder, variant="ema").transformer is not None


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("no model")

    with pytest.raises(QSearchError, match="a folder or a checkpoint in one file"):
        load_pipeline(tmp_path / "model.txt")
