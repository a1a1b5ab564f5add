"""A pipeline whose prior denoises too, with a class of its own: what stays out of the graph is said
with how to take it in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, PriorTransformer, UnCLIPScheduler
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

from qsearch.core.progress import Silent
from qsearch.stages.config import parse
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.zoo.painters import new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH


class Heard(Silent):
    """What is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def parts() -> dict[str, Any]:
    unet = tiny.unet(
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * WIDTH,
    )
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=WIDTH,
        num_layers=1,
        num_embeddings=36,
        additional_embeddings=4,
    )
    return {
        "unet": unet,
        "prior": prior,
        "vae": tiny.vae(),
        "text_encoder": tiny.clip(),
        "prior_text_encoder": tiny.clip(True),
        "tokenizer": new_tokenizer(causal=True),
        "prior_tokenizer": new_tokenizer(causal=True),
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "scheduler": DDIMScheduler(),
    }


def test_a_denoiser_of_another_class_is_said_to_stay_with_how_to_take_it_in(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    tiny.pipeline("StableUnCLIPPipeline", parts()).save_pretrained(tmp_path / "model")
    content = {
        "model": str(tmp_path / "model"),
        "folder": str(tmp_path / "run"),
        "sampling": {"steps": 2, "call": {"prior_num_inference_steps": 2}},
    }
    heard = Heard()
    (tmp_path / "run").mkdir()

    graph = extract(Run(parse(content, "a test"), heard))

    (line,) = [line for line in heard.lines if "another class" in line]
    assert line.startswith(
        "extract: prior, a denoiser of another class, stays as it is; take it in"
    )
    assert "components=[unet, prior]" in line
    assert not any(layer.name.startswith("prior") for layer in graph)
