"""Models small enough to be built in a test: a plain-torch denoiser, a U-Net and a DiT from
diffusers, a whole pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch.core.graph import OpGraph
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Call

WIDTH, CONTEXT = 8, 6


class PlainAttention(nn.Module):
    """Projections by the names that everybody uses, in plain torch."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(context, WIDTH),
            nn.Linear(context, WIDTH),
        )
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        return self.to_out(
            F.scaled_dot_product_attention(self.to_q(rows), self.to_k(context), self.to_v(context))
        )


class PlainBlock(nn.Module):
    """Cross-attention first, then self-attention: the other way round than diffusers' `attn1` and
    `attn2`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = PlainAttention(CONTEXT), PlainAttention(WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        rows = rows + self.attn1(rows, context)
        rows = rows + self.attn2(rows, rows)
        return rows + self.ff(rows)


class PlainDenoiser(nn.Module):
    """Pictures [N, 2, 4, 4], times [N] and context [N, T, 6] in, pictures out; nothing of diffusers
    in it.
    """

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, WIDTH, 3, padding=1)
        self.time_embed = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(blocks))
        self.conv_out = nn.Conv2d(WIDTH, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        hidden = self.conv_in(sample) + self.time_embed(timestep[:, None] / 1000)[..., None, None]
        rows = hidden.flatten(2).transpose(1, 2)
        for block in self.blocks:
            rows = block(rows, context)
        return self.conv_out(rows.transpose(1, 2).unflatten(2, sample.shape[2:]))


def plain_inputs(samples: int = 3, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call of `PlainDenoiser`."""
    dice = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(samples, 2, 4, 4, generator=dice),
        "timestep": torch.linspace(900, 100, samples),
        "context": torch.randn(samples, 5, CONTEXT, generator=dice),
    }


def plain_calls(count: int = 2, samples: int = 3) -> list[Call]:
    """Recorded calls of `PlainDenoiser`, one a step bin."""
    return [Call((), plain_inputs(samples, seed=10 + i), i) for i in range(count)]


def plain() -> tuple[PlainDenoiser, OpGraph]:
    """A `PlainDenoiser` with random weights and its graph."""
    torch.manual_seed(1)
    model = PlainDenoiser().eval()
    return model, extract(model, plain_inputs())


def tiny_unet() -> nn.Module:
    """UNet2DConditionModel with ResNet, self- and cross-attention blocks."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def unet_inputs(samples: int = 2) -> dict[str, Any]:
    """Arguments of one call of `tiny_unet`."""
    return {
        "sample": torch.randn(samples, 4, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(samples, 5, 12),
    }


def tiny_dit() -> nn.Module:
    """PixArtTransformer2DModel with two blocks over 16 image tokens."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
    )


def dit_inputs(samples: int = 2) -> dict[str, Any]:
    """Arguments of one call of `tiny_dit`."""
    return {
        "hidden_states": torch.randn(samples, 4, 8, 8),
        "encoder_hidden_states": torch.randn(samples, 5, 12),
        "timestep": torch.full((samples,), 500.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def tiny_pipeline() -> Any:
    """A StableDiffusionPipeline of random weights: captions of the zoo's world in, pictures of
    16x16 out.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from qsearch.zoo.painters import MAX_WORDS, new_scheduler, new_tokenizer

    torch.manual_seed(2)
    tokenizer = new_tokenizer(causal=True)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_WORDS,
        projection_dim=12,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    )
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(text),
        "unet": tiny_unet(),
        "vae": vae,
        "scheduler": new_scheduler(),
    }
    pipe = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    for part in ("text_encoder", "unet", "vae"):
        getattr(pipe, part).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_scenes_pipeline() -> Any:
    """`tiny_pipeline` with latents of 16x16 whose pictures are 64x64 by an upsampling VAE, as the
    judge wants them.
    """
    from diffusers import AutoencoderKL

    pipe = tiny_pipeline()
    torch.manual_seed(3)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4,) * 4,
    }
    pipe.vae = AutoencoderKL(
        **blocks,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    ).eval()
    return pipe
