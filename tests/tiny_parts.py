"""Parts of diffusers pipelines in their true classes with tiny random weights: VAEs, text encoders,
image encoders, U-Nets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from qsearch.zoo.painters import MAX_WORDS, new_tokenizer

WIDTH = 16  # of every text encoder
#: of image encoders and their processors, in pixels
PICTURE = 16
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
#: what pipelines of Stable Diffusion's kind want besides
UNCHECKED: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def vae(latents: int = 4, levels: int = 2, **more: Any) -> Any:
    """AutoencoderKL: pictures twice as large as the latents for each level but one."""
    from diffusers import AutoencoderKL

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (4,) * levels,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }
    shift = (
        {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
        if latents > 4
        else {}
    )
    sizes = {"latent_channels": latents, "layers_per_block": 1, "sample_size": 16}
    return AutoencoderKL(**blocks | sizes | shift | more)


def vqvae(kind: str = "group", latents: int = 4) -> Any:
    """VQModel; Kandinsky's have a spatial norm, of groups of 32."""
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(32, 32) if kind == "spatial" else (4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents,
        num_vq_embeddings=8,
        vq_embed_dim=latents,
        layers_per_block=1,
        norm_num_groups=2,
        norm_type=kind,
        mid_block_add_attention=False,
    )


def vae_dc(latents: int = 4) -> Any:
    """AutoencoderDC: deep compression, as Sana has it."""
    from diffusers import AutoencoderDC

    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"block_out_channels": (8, 8), "qkv_multiscales": ((), ())}.items()
    }
    return AutoencoderDC(
        latent_channels=latents,
        attention_head_dim=2,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        **sides,
    )


def vae_wan(latents: int = 4, **more: Any) -> Any:
    """AutoencoderKLWan: videos, factor 8 in space and 4 in time, with means and deviations of its
    latents.
    """
    from diffusers import AutoencoderKLWan

    moments = {
        "latents_mean": [0.1, -0.2, 0.0, 0.3] * (latents // 4),
        "latents_std": [1.0, 2.0, 1.5, 0.5] * (latents // 4),
    }
    sizes = {"base_dim": 4, "z_dim": latents, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**sizes, temperal_downsample=[False, True, True], **moments | more)


def vae_cogvideox(latents: int = 4, **more: Any) -> Any:
    """AutoencoderKLCogVideoX: videos, factor 2 in space."""
    from diffusers import AutoencoderKLCogVideoX

    types = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2,
        "block_out_channels": (8, 8),
    }
    return AutoencoderKLCogVideoX(
        latent_channels=latents, layers_per_block=1, norm_num_groups=2, **types | more
    )


def clip(projection: bool = False, **more: Any) -> Any:
    """CLIP's text model."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "vocab_size": len(new_tokenizer(causal=True)),
        "max_position_embeddings": MAX_WORDS,
    }
    config = CLIPTextConfig(**sizes | _SPECIAL | more)
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def clip_vision(projection: bool = True, width: int = WIDTH, side: int = PICTURE) -> Any:
    """CLIP's image model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        image_size=side,
        patch_size=side // 4,
    )
    return CLIPVisionModelWithProjection(config) if projection else CLIPVisionModel(config)


def clip_processor() -> Any:
    """What prepares pictures for `clip_vision`."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE}
    )


def t5(width: int = WIDTH) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(new_tokenizer(causal=False)), **sizes))


def umt5() -> Any:
    """UMT5's encoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(new_tokenizer(causal=False)), **sizes))


def bert() -> Any:
    """BERT."""
    from transformers import BertConfig, BertModel

    width = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return BertModel(BertConfig(vocab_size=len(new_tokenizer(causal=False)), **width))


def language_model(name: str, **more: Any) -> Any:
    """A causal language model of transformers by its class, as Gemma2Model or LlamaModel."""
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(new_tokenizer(causal=True)),
    }
    made = getattr(transformers, name)
    config = made.config_class(**sizes | _SPECIAL | more)
    return made(config)


def chat_tokenizer() -> Any:
    """A tokenizer with a template for messages."""
    tokenizer = new_tokenizer(causal=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def unet(**more: Any) -> Any:
    """UNet2DConditionModel of two levels, the lower one with cross-attention."""
    from diffusers import UNet2DConditionModel

    types = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**types | more)


def pipeline(name: str, parts: Mapping[str, Any], **more: Any) -> Any:
    """A diffusers pipeline by its class, of those parts that it takes; None for optional parts that
    are not there.
    """
    import diffusers

    made = getattr(diffusers, name)
    known = inspect.signature(made.__init__).parameters
    held = {**parts, **more}
    given = {k: held[k] for k in known if k in held}
    nothing = {
        k: None
        for k, p in known.items()
        if k not in given and k != "self" and p.default is inspect.Parameter.empty
    }
    return made(**given, **nothing)


def prepared(pipe: Any) -> Any:
    """The pipeline in evaluation mode, with weights that matter: diffusers starts some of them at
    zero.
    """
    parts = [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]
    for name, part in pipe.components.items():
        denoises = name.startswith(("unet", "transformer", "prior", "decoder", "controlnet"))
        for leaf, parameter in part.named_parameters() if denoises and part in parts else ():
            # biases stay as they are; gates of vectors shut what they gate off
            if (parameter.ndim > 1 or leaf.endswith("gate")) and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    for part in parts:
        part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
