"""Diffusers pipelines in their true classes with tiny random weights: what "any pipeline" is tested
on. Each is built in a second or so.
"""

from __future__ import annotations

from typing import Any

import torch

from qsearch.zoo.painters import MAX_WORDS, new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import UNCHECKED, WIDTH
from tests.tiny_parts import clip as _clip
from tests.tiny_parts import t5 as _t5
from tests.tiny_parts import unet as _unet
from tests.tiny_parts import vae as _vae


def stable_diffusion() -> Any:
    """SD 1.5: U-Net, epsilon prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = {
        "unet": _unet(cross_attention_dim=WIDTH, attention_head_dim=2),
        "vae": _vae(),
        "text_encoder": _clip(False),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    return StableDiffusionPipeline(**parts, tokenizer=new_tokenizer(causal=True), **UNCHECKED)


def stable_diffusion_xl(**more: Any) -> Any:
    """SDXL: two text encoders, sizes as conditions, a scheduler whose latents explode in
    variance.

    `more`: other arguments of its U-Net.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    sizes = {
        "cross_attention_dim": 2 * WIDTH,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    unet = _unet(**sizes | more)
    encoders = {"text_encoder": _clip(False), "text_encoder_2": _clip(True)}
    tokenizers = {
        "tokenizer": new_tokenizer(causal=True),
        "tokenizer_2": new_tokenizer(causal=True),
    }
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        scheduler=EulerDiscreteScheduler(),
        **encoders,
        **tokenizers,
        add_watermarker=False,
    )


def stable_diffusion_xl_deep() -> Any:
    """SDXL's own topology, 794 layers, at a fortieth of its widths."""
    return stable_diffusion_xl(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 8),
    )


def _pixart() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "num_layers": 1,
    }
    norms = {
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "use_additional_conditions": False,
    }
    model = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, **sizes, **norms
    )
    return {
        "transformer": model,
        "vae": _vae(),
        "text_encoder": _t5(),
        "tokenizer": new_tokenizer(causal=False),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def pixart_alpha() -> Any:
    """PixArt-alpha: adaLN-single, T5, a learned variance behind the output."""
    from diffusers import PixArtAlphaPipeline

    return PixArtAlphaPipeline(**_pixart())


def pixart_sigma() -> Any:
    """PixArt-sigma: the same transformer in another pipeline."""
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline(**_pixart())


def hunyuan_dit() -> Any:
    """Hunyuan-DiT: BERT and T5, rotary embeddings, long skips, v-prediction; its positions take a
    VAE of factor 8 for granted.
    """
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "hidden_size": 16,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
    }
    model = HunyuanDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        pooled_projection_dim=16,
        activation_fn="gelu-approximate",
        **sizes,
    )
    tokenizers = {
        "tokenizer": new_tokenizer(causal=False),
        "tokenizer_2": new_tokenizer(causal=False),
    }
    parts = {
        "transformer": model,
        "vae": _vae(levels=4),
        "text_encoder": tiny.bert(),
        "text_encoder_2": _t5(),
        **tokenizers,
    }
    return HunyuanDiTPipeline(
        scheduler=DDPMScheduler(prediction_type="v_prediction"), **parts, **UNCHECKED
    )


def stable_diffusion_3() -> Any:
    """SD3: joint attention, three text encoders, flow matching."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * WIDTH,
    }
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        pos_embed_max_size=8,
        **sizes,
    )
    encoders = {
        "text_encoder": _clip(True),
        "text_encoder_2": _clip(True),
        "text_encoder_3": _t5(2 * WIDTH),
    }
    tokenizers = {
        f"tokenizer{which}": new_tokenizer(causal=which != "_3") for which in ("", "_2", "_3")
    }
    return StableDiffusion3Pipeline(
        transformer=model,
        vae=_vae(8),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **encoders,
        **tokenizers,
    )


def flux() -> Any:
    """Flux: packed latents, positions as arguments, a guidance scale as an input in place of two
    passes.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "axes_dims_rope": (2, 2, 4),
    }
    model = FluxTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, guidance_embeds=True, **sizes
    )
    texts = {
        "text_encoder": _clip(False),
        "tokenizer": new_tokenizer(causal=True),
        "text_encoder_2": _t5(),
        "tokenizer_2": new_tokenizer(causal=False),
    }
    return FluxPipeline(
        transformer=model, vae=_vae(8), scheduler=FlowMatchEulerDiscreteScheduler(), **texts
    )


def sana() -> Any:
    """Sana: linear attention, a causal language model for the text, a VAE of another kind."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
    }
    model = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        caption_channels=WIDTH,
        **heads,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return SanaPipeline(
        transformer=model,
        vae=tiny.vae_dc(),
        text_encoder=tiny.language_model("Gemma2Model"),
        tokenizer=new_tokenizer(causal=True),
        scheduler=scheduler,
    )


def cogvideox() -> Any:
    """CogVideoX: video, five-dimensional latents, v-prediction."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "max_text_seq_length": MAX_WORDS,
    }
    video = {
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "temporal_compression_ratio": 4,
    }
    model = CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, patch_size=2, **sizes, **video
    )
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return CogVideoXPipeline(
        transformer=model,
        vae=tiny.vae_cogvideox(),
        text_encoder=_t5(),
        tokenizer=new_tokenizer(causal=False),
        scheduler=scheduler,
    )


def wan_22() -> Any:
    """Wan 2.2: video, a denoiser for the noisiest steps and another for the rest, guidance in two
    calls.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def denoiser() -> Any:
        heads = {"num_attention_heads": 2, "attention_head_dim": 16}
        sizes = {"text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 64, "rope_max_seq_len": 32}
        return WanTransformer3DModel(
            in_channels=4, out_channels=4, num_layers=2, cross_attn_norm=True, **heads, **sizes
        )

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        transformer=denoiser(),
        transformer_2=denoiser(),
        boundary_ratio=0.875,
        vae=tiny.vae_wan(),
        text_encoder=_t5(),
        tokenizer=new_tokenizer(causal=False),
        scheduler=scheduler,
    )


def z_image() -> Any:
    """Z-Image: lists of latents and of texts, one a sample."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    return ZImagePipeline(
        transformer=model,
        vae=_vae(),
        text_encoder=tiny.language_model("Qwen3Model", intermediate_size=32, num_key_value_heads=2),
        tokenizer=tiny.chat_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def auraflow() -> Any:
    """AuraFlow: joint and single blocks, UMT5, flow matching with learnt positions."""
    from diffusers import (
        AuraFlowPipeline,
        AuraFlowTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )

    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        transformer=model,
        vae=_vae(),
        text_encoder=tiny.umt5(),
        tokenizer=new_tokenizer(causal=False),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


BUILDERS = {
    f.__name__: f
    for f in (
        stable_diffusion,
        stable_diffusion_xl,
        pixart_alpha,
        pixart_sigma,
        hunyuan_dit,
        stable_diffusion_3,
        flux,
        sana,
        cogvideox,
        wan_22,
        z_image,
        auraflow,
    )
}
#: of hundreds of layers: too slow for every test
DEEP = {f.__name__: f for f in (stable_diffusion_xl_deep,)}


def build(name: str) -> Any:
    """A pipeline by name, in evaluation mode, with weights that matter: diffusers starts some of
    them at zero.
    """
    torch.manual_seed(4)
    return tiny.prepared((BUILDERS | DEEP)[name]())
