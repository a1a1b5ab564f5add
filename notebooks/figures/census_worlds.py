"""Tiny pipelines of the census that make videos, continued: Helios, HunyuanVideo 1.5,
Motif, AnyFlow, EasyAnimate, LTX-2 and others with parts of their own.
"""

from __future__ import annotations

from typing import Any

from census_inputs import FORWARDS, ONE, PICTURE, SIZE, VIDEO, Change, Entry, entries, made, same
from census_transformers import MROPE, flow, qwen_vl
from census_videos import animated, hunyuan_vae, vae_ltx

from qsearch.zoo.painters import new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH

_32 = {"height": 32, "width": 32}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
_CLIP = {**SIZE, "num_frames": 5}
_NEGATIVE = {"negative_prompt": "a blue square"}


def _wan_text() -> dict[str, Any]:
    return {
        "scheduler": flow(shift=7.0),
        "vae": tiny.vae_wan(16),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
    }


#: of transformers that Wan's was the model of
_LIKE_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "in_channels": 16,
    "out_channels": 16,
    **_HEADS,
}


def _anyflow(name: str, **more: Any) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        model = made(
            name, **_LIKE_WAN, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r", **more
        )
        return {"transformer": model, "scheduler": made("FlowMapEulerDiscreteScheduler", shift=5.0)}

    return change


def _image_encoder(width: int = WIDTH) -> dict[str, Any]:
    return {
        "image_encoder": tiny.clip_vision(width=width),
        "image_processor": tiny.clip_processor(),
    }


def _chrono(_: dict[str, Any]) -> dict[str, Any]:
    config = {**_LIKE_WAN, "in_channels": 36, "image_dim": WIDTH, "rope_max_seq_len": 32}
    return {"transformer": made("ChronoEditTransformer3DModel", **config), **_image_encoder()}


def _helios(**more: Any) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        model = made(
            "HeliosTransformer3DModel",
            **_LIKE_WAN,
            rope_dim=(4, 4, 4),
            has_multi_term_memory_patch=True,
            guidance_cross_attn=True,
            zero_history_timestep=True,
            is_amplify_history=False,
        )
        return {"transformer": model, **{k: v() for k, v in more.items()}}

    return change


def _helios_scheduler() -> Any:
    return made("HeliosScheduler", stage_range=[0, 1], stages=1, use_dynamic_shifting=True)


def _wan_animate(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "WanAnimateTransformer3DModel",
        **{**_LIKE_WAN, "in_channels": 36},
        latent_channels=16,
        image_dim=WIDTH,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return {"transformer": model, **_image_encoder()}


def _motif(**more: Any) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        from transformers import SiglipImageProcessor
        from transformers.models.t5gemma2.modeling_t5gemma2 import (
            T5Gemma2Encoder,
            T5Gemma2EncoderConfig,
        )

        text = {
            "hidden_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "head_dim": 8,
            "vocab_size": len(new_tokenizer(causal=False)),
            "max_position_embeddings": 128,
            "dropout_rate": 0.0,
        }
        vision = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 16,
            "patch_size": 4,
        }
        model = made(
            "MotifVideoTransformer3DModel",
            in_channels=33,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            patch_size=1,
            patch_size_t=1,
            qk_norm="rms_norm",
            text_embed_dim=WIDTH,
            rope_axes_dim=(4, 4, 4),
            **_HEADS,
            **more,
        )
        config = T5Gemma2EncoderConfig(text_config=text, vision_config=vision)
        return {
            "transformer": model,
            "text_encoder": T5Gemma2Encoder(config),
            "guider": made("AdaptiveProjectedGuidance"),
            "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
        }

    return change


WAN_LIKE = entries(
    _wan_text,
    {
        "AnyFlowPipeline": (_anyflow("AnyFlowTransformer3DModel"), {**SIZE, "num_frames": 9}),
        "AnyFlowFARPipeline": (
            _anyflow(
                "AnyFlowFARTransformer3DModel",
                compressed_patch_size=(1, 4, 4),
                full_chunk_limit=3,
                chunk_partition=(1, 1, 1),
            ),
            {**SIZE, "num_frames": 9, **FORWARDS},
        ),
        "ChronoEditPipeline": (_chrono, {"image": PICTURE, **_CLIP, **_NEGATIVE, **ONE}),
        "HeliosPipeline": (
            _helios(scheduler=_helios_scheduler),
            {**SIZE, "num_frames": 9, **_NEGATIVE},
        ),
        "HeliosPyramidPipeline": (
            _helios(scheduler=_helios_scheduler),
            {
                **_32,
                "num_frames": 9,
                "pyramid_num_inference_steps_list": [2],
                **_NEGATIVE,
            },
        ),
        "WanAnimatePipeline": (
            _wan_animate,
            {
                "image": PICTURE,
                "pose_video": VIDEO,
                "face_video": VIDEO,
                **SIZE,
                "segment_frame_length": 77,
                "prev_segment_conditioning_frames": 1,
                **ONE,
            },
        ),
        "MotifVideoPipeline": (_motif(), {**SIZE, "num_frames": 9}),
        "MotifVideoImage2VideoPipeline": (
            _motif(image_embed_dim=8),
            {"image": PICTURE, **SIZE, "num_frames": 9, **ONE},
        ),
    },
)


def _hunyuan15(kind: str) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        from transformers import ByT5Tokenizer, SiglipImageProcessor

        model = made(
            "HunyuanVideo15Transformer3DModel",
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=16,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type=kind,
        )
        vae = made(
            "AutoencoderKLHunyuanVideo15",
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        )
        return {
            "transformer": model,
            "vae": vae,
            "text_encoder": tiny.language_model(
                "Qwen2_5_VLTextModel", num_hidden_layers=3, rope_parameters=MROPE
            ),
            "tokenizer": tiny.chat_tokenizer(),
            "text_encoder_2": tiny.t5(words=400),
            "tokenizer_2": ByT5Tokenizer(),
            "guider": made("ClassifierFreeGuidance", guidance_scale=3.0),
            "image_encoder": tiny.siglip(),
            "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
        }

    return change


def _hunyuan_image(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "HunyuanVideoTransformer3DModel",
        in_channels=2 * 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
        image_condition_type="latent_concat",
    )
    return {
        "transformer": model,
        "vae": hunyuan_vae(),
        "text_encoder": tiny.llava(),
        "tokenizer": tiny.chat_tokenizer(),
        "text_encoder_2": tiny.clip(max_position_embeddings=77),
        "tokenizer_2": new_tokenizer(causal=True),
        "image_processor": tiny.clip_processor(),
    }


def _framepack(_: dict[str, Any]) -> dict[str, Any]:
    from transformers import SiglipImageProcessor

    model = made(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    return {
        "transformer": model,
        "vae": hunyuan_vae(),
        "text_encoder": tiny.language_model("LlamaModel", num_hidden_layers=3),
        "tokenizer": tiny.chat_tokenizer(),
        "text_encoder_2": tiny.clip(max_position_embeddings=77),
        "tokenizer_2": new_tokenizer(causal=True),
        "image_encoder": tiny.siglip(),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
    }


def _easy(channels: int) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        model = made(
            "EasyAnimateTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=WIDTH,
            num_layers=1,
            sample_width=16,
            sample_height=16,
            patch_size=2,
        )
        vae = made(
            "AutoencoderKLMagvit",
            down_block_types=("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3),
            up_block_types=("SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3),
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        )
        return {
            "transformer": model,
            "vae": vae,
            "text_encoder": qwen_vl("Qwen2VLForConditionalGeneration"),
            "tokenizer": tiny.vision_tokenizer(),
        }

    return change


_TEMPLATE = {"template": "{}", "crop_start": 0}
_SEEN = {"image_emb_len": 16, "image_emb_start": 3, "image_emb_end": 19}
HUNYUAN = entries(
    _wan_text,
    {
        "HunyuanVideo15Pipeline": (_hunyuan15("t2v"), {**SIZE, "num_frames": 9, **_NEGATIVE}),
        "HunyuanVideo15ImageToVideoPipeline": (
            _hunyuan15("i2v"),
            {"image": PICTURE, "num_frames": 9, **_NEGATIVE, **ONE},
        ),
        "HunyuanVideoImageToVideoPipeline": (
            _hunyuan_image,
            {
                "image": PICTURE,
                **SIZE,
                "num_frames": 9,
                "prompt_template": {**_TEMPLATE, **_SEEN},
                **ONE,
            },
        ),
        "HunyuanVideoFramepackPipeline": (
            _framepack,
            {
                "image": PICTURE,
                **_32,
                "num_frames": 9,
                "latent_window_size": 3,
                "prompt_template": _TEMPLATE,
                **ONE,
            },
        ),
        "EasyAnimatePipeline": (_easy(4), {**_CLIP, **_NEGATIVE}),
        "EasyAnimateInpaintPipeline": (
            _easy(9),
            {
                **_CLIP,
                "video": "clip.safetensors",
                "mask_video": "clip_mask.safetensors",
                **_NEGATIVE,
                **ONE,
            },
        ),
    },
)


def _ltx2(**more: Any) -> dict[str, Any]:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    layers = 2
    model = made(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
        **more,
    )
    sides = {
        f"{side}_connector_{name}": value
        for side in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=layers + 1,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
        **sides,
    )
    vae = made(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio = made(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return {
        "transformer": model,
        "connectors": connectors,
        "vae": vae,
        "audio_vae": audio,
        "vocoder": vocoder,
        "scheduler": flow(),
        "text_encoder": tiny.gemma3(num_hidden_layers=layers),
        "tokenizer": new_tokenizer(causal=True),
    }


#: guidance by text alone
_LTX2 = {
    **_32,
    "num_frames": 5,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
    **_NEGATIVE,
}
_SOUND = {"audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
LTX2 = entries(
    _ltx2,
    {
        "LTX2Pipeline": (same, {**_LTX2, **_SOUND}),
        "LTX2ImageToVideoPipeline": (
            same,
            {"image": PICTURE, "image_crf": 0, **_LTX2, **_SOUND, **ONE},
        ),
        "LTX2ConditionPipeline": (same, {**_LTX2, **_SOUND}),
        "LTX2InContextPipeline": (same, {**_LTX2, **_SOUND}),
        "LTX2HDRPipeline": (same, _LTX2),
        "LTX2DFRPipeline": (
            lambda _: {"transformer": _ltx2(use_keyframes_abs_pos_embedding=True)["transformer"]},
            {**_32, "num_frames": 5, "use_cross_timestep": False},
        ),
    },
)


def _ltx_long() -> dict[str, Any]:
    model = made(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    return {**_wan_text(), "scheduler": flow(), "transformer": model, "vae": vae_ltx()}


def _sana_wm() -> dict[str, Any]:
    held = _ltx2()
    model = made(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=WIDTH,
        mixed_precision="no",
    )
    return {
        "transformer": model,
        "vae": held["vae"],
        "scheduler": flow(),
        "text_encoder": tiny.language_model("Gemma2Model"),
        "tokenizer": new_tokenizer(causal=True),
    }


def _animated_xl() -> dict[str, Any]:
    unet = tiny.unet(
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    texts = {"text_encoder_2": tiny.clip(True), "tokenizer_2": new_tokenizer(causal=True)}
    return {**animated(motion_mid_block=False), "unet": unet, **texts}


SINGLE = {
    **entries(
        _ltx_long,
        {
            "LTXI2VLongMultiPromptPipeline": (
                same,
                {**_32, "num_frames": 17, "temporal_tile_size": 16, "temporal_overlap": 8, **ONE},
            )
        },
    ),
    **entries(
        _sana_wm,
        {
            "SanaWMPipeline": (
                same,
                {
                    "image": PICTURE,
                    **_32,
                    "num_frames": 9,
                    "action": "w-8",
                    "intrinsics": [20.0, 20.0, 16.0, 16.0],
                    **ONE,
                },
            )
        },
    ),
    **entries(_animated_xl, {"AnimateDiffSDXLPipeline": (same, {"num_frames": 4})}),
}

PIPELINES: dict[str, Entry] = {**WAN_LIKE, **HUNYUAN, **LTX2, **SINGLE}
