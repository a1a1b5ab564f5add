"""Tiny pipelines of the census that make pictures, continued: those whose text is read by large
language models (Flux 2, Ernie, HiDream, Hunyuan-Image, Ideogram, Kandinsky 5, Krea), PRX,
VisualCloze and others with parts of their own.
"""

from __future__ import annotations

import json
from typing import Any

from census_inputs import FORWARDS, LARGE, ONE, PICTURE, SIZE, Change, Entry, entries, made
from census_transformers import FLUX2, flow, parts_of, qwen_vl
from census_videos import hunyuan_vae

from qsearch.zoo.painters import MAX_WORDS, new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH

_32 = {"height": 32, "width": 32}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
#: prompts that are JSON themselves
EDITS = [
    json.dumps({"prompt": json.dumps({"edit_instruction": f"make it {colour}"})})
    for colour in ("red", "blue", "green", "grey", "black", "white", "brown", "pink")
]
_NEGATIVE = {"negative_prompt": "a blue square"}


def _parts() -> dict[str, Any]:
    return {
        "scheduler": flow(),
        "vae": tiny.vae(16),
        "text_encoder": qwen_vl(layers=3),
        "tokenizer": tiny.vision_tokenizer(),
    }


def _model(name: str, config: dict[str, Any], **parts: Any) -> Change:
    """A transformer by its class and configuration, further parts by their builders."""

    def change(_: dict[str, Any]) -> dict[str, Any]:
        return {"transformer": made(name, **config), **{k: part() for k, part in parts.items()}}

    return change


def _flux2(_: dict[str, Any]) -> dict[str, Any]:
    config = {**FLUX2, "guidance_embeds": True}
    return {
        "transformer": made("Flux2Transformer2DModel", **config),
        "vae": tiny.vae_flux2(),
        "text_encoder": tiny.mistral3(),
    }


_ernie = _model(
    "ErnieImageTransformer2DModel",
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    },
    vae=tiny.vae_flux2,
    text_encoder=lambda: tiny.mistral3(False),
)


def _hidream(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        **_HEADS,
    )
    texts = {
        "text_encoder": tiny.clip(True),
        "text_encoder_2": tiny.clip(True),
        "text_encoder_3": tiny.t5(),
        "text_encoder_4": tiny.language_model("LlamaForCausalLM"),
    }
    tokenizers = {
        f"tokenizer{which}": new_tokenizer(causal=which != "_3") for which in ("", "_2", "_3", "_4")
    }
    return {"transformer": model, "vae": tiny.vae(shift_factor=0.1), **texts, **tokenizers}


def _hunyuan_image(_: dict[str, Any]) -> dict[str, Any]:
    from transformers import ByT5Tokenizer

    model = made(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
        **_HEADS,
    )
    vae = made(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        scaling_factor=0.48,
        spatial_compression_ratio=8,
        sample_size=128,
    )
    guider = {"adaptive_projected_guidance_start_step": 1}
    return {
        "transformer": model,
        "vae": vae,
        "text_encoder_2": tiny.t5(words=400),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": made("AdaptiveProjectedMixGuidance", **guider),
        "ocr_guider": made("AdaptiveProjectedMixGuidance", **guider),
    }


def _hunyuan_refiner(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "HunyuanImageTransformer2DModel",
        in_channels=16,
        out_channels=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
        guidance_embeds=True,
        **_HEADS,
    )
    vae = made(
        "AutoencoderKLHunyuanImageRefiner",
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return {"transformer": model, "vae": vae}


def _ideogram(_: dict[str, Any]) -> dict[str, Any]:
    def denoiser() -> Any:
        return made(
            "Ideogram4Transformer2DModel",
            in_channels=16,
            num_layers=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * WIDTH,
            mrope_section=(2, 1, 1),
            **_HEADS,
        )

    return {
        "transformer": denoiser(),
        "unconditional_transformer": denoiser(),
        "vae": tiny.vae_flux2(),
        "text_encoder": qwen_vl("Qwen3VLModel", layers=36),
    }


def kandinsky5(visual: bool, **parts: Any) -> Change:
    """Kandinsky 5's transformer; one that sees a first picture or not."""
    config = {
        "in_visual_dim": 16,
        "in_text_dim": WIDTH,
        "in_text_dim2": WIDTH,
        "time_dim": 16,
        "out_visual_dim": 16,
        "patch_size": (1, 2, 2),
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (1, 1, 2),
        "visual_cond": visual,
        "attention_type": "regular",
    }
    texts = {
        "tokenizer": lambda: tiny.vision_tokenizer(letters=True),
        "text_encoder_2": lambda: tiny.clip(max_position_embeddings=77),
        "tokenizer_2": lambda: new_tokenizer(causal=True),
    }
    return _model("Kandinsky5Transformer3DModel", config, **texts, **parts)


_KREA = {
    "in_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "timestep_embed_dim": 8,
    "text_hidden_dim": WIDTH,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 2, 2),
    "rope_theta": 1000.0,
}


def _krea(_: dict[str, Any]) -> dict[str, Any]:
    vae = made(
        "AutoencoderKLQwenImage",
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = flow(use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=6400)
    return {
        "transformer": made("Krea2Transformer2DModel", **_KREA),
        "vae": vae,
        "scheduler": scheduler,
        "text_encoder": qwen_vl("Qwen3VLModel"),
        "text_encoder_select_layers": (0, 1, 2),
    }


def _prx(channels: int, width: int = WIDTH, **more: Any) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": channels,
        "context_in_dim": width,
        "hidden_size": 8,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [2, 2],
        **more,
    }


_prx_latent = _model(
    "PRXTransformer2DModel",
    _prx(4),
    vae=lambda: tiny.vae(shift_factor=0.0),
    text_encoder=tiny.t5gemma,
    tokenizer=lambda: new_tokenizer(causal=True),
)
_prx_pixel = _model(
    "PRXTransformer2DModel",
    _prx(3, bottleneck_size=8, resolution_embeds=True),
    text_encoder=lambda: tiny.language_model("Qwen3Model"),
    tokenizer=lambda: new_tokenizer(causal=True),
)


def _fibo_edit(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "BriaFiboTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=2 * WIDTH,
        text_encoder_dim=WIDTH,
        axes_dims_rope=[0, 4, 4],
        **_HEADS,
    )
    vae = tiny.vae_wan(
        16,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        is_residual=True,
        decoder_base_dim=4,
    )
    return {
        "transformer": model,
        "vae": vae,
        "text_encoder": tiny.language_model("SmolLM3ForCausalLM", vocab_size=128_256),
        "tokenizer": new_tokenizer(causal=True),
    }


def _cloze(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "FluxTransformer2DModel",
        in_channels=80,
        out_channels=32,
        num_layers=1,
        num_single_layers=1,
        guidance_embeds=True,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        **_HEADS,
    )
    return {"transformer": model, "resolution": 32}


def _z_omni(_: dict[str, Any]) -> dict[str, Any]:
    from transformers import Siglip2ImageProcessor

    model = made(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        siglip_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 64, 64],
    )
    return {
        "transformer": model,
        "vae": tiny.vae(shift_factor=0.1),
        "text_encoder": tiny.language_model("Qwen3Model", vocab_size=len(tiny.vision_tokenizer())),
        "tokenizer": tiny.vision_tokenizer(),
        "siglip": tiny.siglip2(),
        "siglip_processor": Siglip2ImageProcessor(patch_size=4, max_num_patches=16),
    }


PICTURES = entries(
    _parts,
    {
        "Flux2Pipeline": (
            _flux2,
            {**SIZE, "text_encoder_out_layers": [1, 2, 3], "max_sequence_length": 160},
        ),
        "ErnieImagePipeline": (_ernie, {**_32, **_NEGATIVE}),
        "HiDreamImagePipeline": (
            _hidream,
            {**SIZE, "max_sequence_length": MAX_WORDS, **_NEGATIVE, **FORWARDS},
        ),
        "HunyuanImagePipeline": (_hunyuan_image, {**SIZE, **_NEGATIVE}),
        "HunyuanImageRefinerPipeline": (_hunyuan_refiner, {"image": PICTURE, **SIZE, **_NEGATIVE}),
        "Ideogram4Pipeline": (
            _ideogram,
            {**_32, "max_sequence_length": 64, "guidance_schedule": None},
        ),
        "Kandinsky5T2IPipeline": (kandinsky5(False), {**_NEGATIVE, "max_sequence_length": 1000}),
        "Krea2Pipeline": (_krea, {**_32, "max_sequence_length": 64, **_NEGATIVE}),
        "PRXPipeline": (
            _prx_latent,
            {**SIZE, "tokenizer_max_length": MAX_WORDS, **_NEGATIVE, **ONE},
        ),
        "PRXPixelPipeline": (_prx_pixel, {**SIZE, **_NEGATIVE, **ONE}),
        "BriaFiboEditPipeline": (
            _fibo_edit,
            {
                "image": LARGE,
                "height": 64,
                "width": 64,
                "_auto_resize": False,
                **ONE,
                "prompts": EDITS,
            },
        ),
        "Kandinsky5T2VPipeline": (
            kandinsky5(False, vae=lambda: hunyuan_vae(16)),
            {**_32, "num_frames": 5, **_NEGATIVE, "max_sequence_length": 1000},
        ),
        "Kandinsky5I2VPipeline": (
            kandinsky5(True, vae=lambda: hunyuan_vae(16)),
            {"image": PICTURE, **_32, "num_frames": 17, **_NEGATIVE, "max_sequence_length": 1000},
        ),
    },
)

PIPELINES: dict[str, Entry] = {
    **PICTURES,
    **entries(
        parts_of("flux"),
        {
            "VisualClozeGenerationPipeline": (
                _cloze,
                {
                    "task_prompt": "a small circle",
                    "content_prompt": "a red circle",
                    "image": [[PICTURE, PICTURE], [PICTURE, None]],
                    **ONE,
                },
            ),
        },
    ),
    **entries(
        parts_of("z_image"),
        {
            "ZImageOmniPipeline": (_z_omni, {**_32, "max_sequence_length": 64, **ONE}),
        },
    ),
}
