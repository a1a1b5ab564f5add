"""Small denoisers for the tests of graphs: diffusers classes with tiny configurations, and some
written in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Case = tuple[nn.Module, dict[str, Any]]
_TEXT = torch.ones(1, 7, 16)
_STEP = torch.tensor([3])


def pixart(blocks: int = 2) -> Case:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        in_channels=4,
        out_channels=8,
    )
    text = {
        "encoder_hidden_states": torch.ones(1, 7, 12),
        "encoder_attention_mask": torch.ones(1, 7),
    }
    return model, {
        "hidden_states": torch.ones(1, 4, 8, 8),
        "timestep": _STEP,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        **text,
    }


def sdxl() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        norm_num_groups=8,
    )
    added = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
    return model, {
        "sample": torch.ones(1, 4, 8, 8),
        "timestep": _STEP,
        "encoder_hidden_states": _TEXT,
        "added_cond_kwargs": added,
    }


def hunyuan(blocks: int = 4) -> Case:
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        sample_size=8,
        patch_size=2,
        hidden_size=16,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        pooled_projection_dim=8,
        text_len=5,
        text_len_t5=6,
        activation_fn="gelu-approximate",
        norm_type="layer_norm",
        use_style_cond_and_image_meta_size=False,
    )
    text = {
        "encoder_hidden_states": torch.ones(1, 5, 16),
        "text_embedding_mask": torch.ones(1, 5),
        "encoder_hidden_states_t5": torch.ones(1, 6, 24),
        "text_embedding_mask_t5": torch.ones(1, 6),
    }
    rotary = (torch.ones(16, 8), torch.ones(16, 8))
    return model, {
        "hidden_states": torch.ones(1, 4, 8, 8),
        "timestep": _STEP.float(),
        **text,
        "image_rotary_emb": rotary,
    }


def sd3() -> Case:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": torch.ones(1, 4, 8, 8),
        "encoder_hidden_states": _TEXT,
        "pooled_projections": torch.ones(1, 24),
        "timestep": _STEP,
    }


def flux() -> Case:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    tokens = {
        "hidden_states": torch.ones(1, 16, 4),
        "encoder_hidden_states": _TEXT,
        "img_ids": torch.ones(16, 3),
        "txt_ids": torch.ones(7, 3),
    }
    return model, {
        **tokens,
        "pooled_projections": torch.ones(1, 24),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
    }


def sana() -> Case:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        mlp_ratio=2.0,
        sample_size=8,
    )
    return model, {
        "hidden_states": torch.ones(1, 4, 8, 8),
        "encoder_hidden_states": _TEXT,
        "timestep": _STEP,
    }


def others() -> dict[str, Callable[[], Case]]:
    """Tiny configurations of classes that have no card: class name -> model and inputs."""
    import diffusers

    image, video = (
        {"hidden_states": torch.ones(1, 4, 8, 8)},
        {"hidden_states": torch.ones(1, 4, 2, 8, 8)},
    )
    text, step = {"encoder_hidden_states": _TEXT}, {"timestep": _STEP}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    sizes = {
        "original_size": torch.ones(1, 2),
        "target_size": torch.ones(1, 2),
        "crop_coords": torch.ones(1, 2),
    }
    unet = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    ends = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    cog = {
        **heads,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    aura = {
        **heads,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "pos_embed_max_size": 16,
    }
    lumina = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
    }
    mochi = {
        **heads,
        "in_channels": 4,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 7,
    }
    chroma = {
        **heads,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 16,
        "approximator_num_channels": 8,
    }
    latte = {
        **heads,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
        "cross_attention_dim": 16,
        "caption_channels": 16,
    }
    allegro = {
        **heads,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "cross_attention_dim": 16,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 2,
    }
    mask = {"encoder_attention_mask": torch.ones(1, 7, dtype=torch.bool)}
    ids = {"img_ids": torch.ones(16, 3), "txt_ids": torch.ones(7, 3)}
    tokens = {"hidden_states": torch.ones(1, 16, 4), **text}
    chosen: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "AuraFlowTransformer2DModel": (
            {**aura, "caption_projection_dim": 16, "joint_attention_dim": 16},
            {**image, **text, **step},
        ),
        "CogView3PlusTransformer2DModel": (
            {**cog, "sample_size": 8, "pos_embed_max_size": 8},
            {**image, **text, **step, **sizes},
        ),
        "CogView4Transformer2DModel": (
            {**cog, "rope_axes_dim": (8, 8)},
            {**image, **text, **step, **sizes},
        ),
        "Lumina2Transformer2DModel": (
            {
                **lumina,
                "axes_dim_rope": (4, 2, 2),
                "axes_lens": (32, 32, 32),
                "cap_feat_dim": 16,
                "multiple_of": 2,
            },
            {**image, **text, **step, **mask},
        ),
        "MochiTransformer3DModel": (mochi, {**video, **text, **step, **mask}),
        "ChromaTransformer2DModel": (
            {
                **chroma,
                "axes_dims_rope": (2, 2, 4),
                "approximator_hidden_dim": 16,
                "approximator_layers": 1,
            },
            {**tokens, **ids, "timestep": torch.tensor([0.5]), "attention_mask": torch.ones(1, 23)},
        ),
        "LatteTransformer3DModel": (
            {**latte, "norm_type": "ada_norm_single", "video_length": 2},
            {**video, **text, **step},
        ),
        "AllegroTransformer3DModel": (
            {**allegro, "caption_channels": 16, "patch_size": 2, "patch_size_t": 1},
            {
                **video,
                **text,
                **step,
                "attention_mask": torch.ones(1, 2, 8, 8),
                "encoder_attention_mask": torch.ones(1, 7),
            },
        ),
        "UNet2DModel": (
            {**unet, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, **ends},
            {"sample": torch.ones(1, 4, 8, 8), **step},
        ),
        "UNet1DModel": (
            {
                "block_out_channels": (8, 8),
                "in_channels": 4,
                "out_channels": 4,
                "sample_size": 8,
                "norm_num_groups": 4,
            }
            | {
                "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
                "up_block_types": ("UpResnetBlock1D",),
                "mid_block_type": "MidResTemporalBlock1D",
            }
            | {
                "time_embedding_type": "positional",
                "use_timestep_embedding": True,
                "out_block_type": "OutConv1DBlock",
                "act_fn": "swish",
            },
            {"sample": torch.ones(1, 4, 8), **step},
        ),
        "UNet3DConditionModel": (
            {
                **unet,
                "cross_attention_dim": 16,
                "attention_head_dim": 8,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            }
            | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
            {"sample": torch.ones(1, 4, 2, 8, 8), **text, **step},
        ),
    }
    return {
        name: lambda name=name, c=config, i=inputs: (getattr(diffusers, name)(**c), i)
        for name, (config, inputs) in chosen.items()
    }


class PlainBlock(nn.Module):
    """adaLN, attention by hand on one fused projection, torch's own attention on the text, a gated
    feed-forward.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.look = nn.MultiheadAttention(width, 2, batch_first=True)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, emb: Tensor, words: Tensor) -> Tensor:
        shift, scale, gate = self.modulate(emb)[:, None].chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(-1, (2, -1))
            for part in self.qkv(norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        x = x + gate * self.mix(
            torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).flatten(2)
        )
        x = x + self.look(norm(x), words, words, need_weights=False)[0]
        value, control = self.wide(norm(x)).chunk(2, dim=-1)
        return x + self.narrow(value * F.silu(control))


class Plain(nn.Module):
    """A denoiser in plain torch: no diffusers class, no diffusers names."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.clock = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.patch = nn.Conv2d(4, width, 2, stride=2)
        self.words = nn.Linear(12, width)
        self.body = nn.ModuleList(PlainBlock(width) for _ in range(2))
        self.unpatch = nn.ConvTranspose2d(width, 4, 2, stride=2)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb, words = self.clock(t[:, None].to(x.dtype)), self.words(context)
        h = self.patch(x)
        rows, columns = h.shape[-2:]
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.body:
            tokens = block(tokens, emb, words)
        return self.unpatch(tokens.transpose(1, 2).unflatten(-1, (rows, columns)))


def plain() -> Case:
    return Plain(), {"x": torch.ones(1, 4, 8, 8), "t": _STEP, "context": torch.ones(1, 7, 12)}


def norm(x: Tensor) -> Tensor:
    """RMS norm by hand."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
