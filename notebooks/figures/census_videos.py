"""Tiny pipelines of the census that make videos or sound."""

from __future__ import annotations

from typing import Any

from census_inputs import MASKS, ONE, PICTURE, SIZE, VIDEO, Change, Entry, entries, made, same
from census_transformers import flow, parts_of

from qsearch.zoo.painters import MAX_WORDS, new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import UNCHECKED, WIDTH

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_CLIP = {**SIZE, "num_frames": 5}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def _cogvideox(channels: int, **more: Any) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        model = made(
            "CogVideoXTransformer3DModel",
            in_channels=channels,
            out_channels=4,
            num_layers=1,
            patch_size=2,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            max_text_seq_length=MAX_WORDS,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            temporal_compression_ratio=2,
            num_attention_heads=2,
            attention_head_dim=16,
            **more,
        )
        return {"transformer": model, "vae": tiny.vae_cogvideox(temporal_compression_ratio=2)}

    return change


COGVIDEOX = entries(
    parts_of("cogvideox"),
    {
        "CogVideoXPipeline": (same, _CLIP),
        "CogVideoXImageToVideoPipeline": (
            _cogvideox(
                8, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True
            ),
            {"image": PICTURE, **_CLIP},
        ),
        "CogVideoXVideoToVideoPipeline": (_cogvideox(4), {"video": VIDEO, **SIZE}),
        "CogVideoXFunControlPipeline": (_cogvideox(8), {"control_video": VIDEO, **SIZE}),
    },
)


def _wan_parts() -> dict[str, Any]:
    return {
        "scheduler": flow(shift=7.0),
        "vae": tiny.vae_wan(16),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
        "transformer": made("WanTransformer3DModel", in_channels=16, out_channels=16, **_WAN),
    }


def unipc(**more: Any) -> Any:
    """UniPC on flow matching."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **more
    )


def _wan_image(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "WanTransformer3DModel",
        in_channels=36,
        out_channels=16,
        image_dim=WIDTH,
        **_WAN,
    )
    return {
        "transformer": model,
        "image_encoder": tiny.clip_vision(False),
        "image_processor": tiny.clip_processor(),
    }


def _wan_vace(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "WanVACETransformer3DModel",
        in_channels=16,
        out_channels=16,
        vace_layers=[0],
        vace_in_channels=96,
        **_WAN,
    )
    return {"transformer": model}


def _skyreels(_: dict[str, Any]) -> dict[str, Any]:
    model = made("SkyReelsV2Transformer3DModel", in_channels=16, out_channels=16, **_WAN)
    return {"transformer": model, "scheduler": unipc()}


def _skyreels_image(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "SkyReelsV2Transformer3DModel", in_channels=36, out_channels=16, image_dim=WIDTH, **_WAN
    )
    return {
        "transformer": model,
        "scheduler": unipc(),
        "image_encoder": tiny.clip_vision(True),
        "image_processor": tiny.clip_processor(),
    }


_FORCING = {"ar_step": 0, "overlap_history": None, "num_frames": 9, **SIZE}
WAN = entries(
    _wan_parts,
    {
        "WanPipeline": (same, _CLIP),
        "WanImageToVideoPipeline": (_wan_image, {"image": PICTURE, **_CLIP, **ONE}),
        "WanVideoToVideoPipeline": (same, {"video": VIDEO, **SIZE}),
        "WanVACEPipeline": (_wan_vace, {"video": VIDEO, "mask": MASKS, **_CLIP}),
        "LucyEditPipeline": (
            lambda _: {
                "transformer": made(
                    "WanTransformer3DModel", in_channels=32, out_channels=16, **_WAN
                )
            },
            {"video": VIDEO, **_CLIP},
        ),
        "SkyReelsV2Pipeline": (_skyreels, _CLIP),
        "SkyReelsV2ImageToVideoPipeline": (_skyreels_image, {"image": PICTURE, **_CLIP, **ONE}),
        "SkyReelsV2DiffusionForcingPipeline": (_skyreels, _FORCING),
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": (
            _skyreels,
            {"image": PICTURE, **_FORCING, **ONE},
        ),
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": (
            _skyreels,
            {"video": VIDEO, **_FORCING, "overlap_history": 1},
        ),
    },
)


def vae_ltx() -> Any:
    """LTX's VAE."""
    return made(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def _ltx() -> dict[str, Any]:
    model = made(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        **_HEADS,
    )
    return {
        "transformer": model,
        "vae": vae_ltx(),
        "scheduler": flow(),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
    }


_LTX = {"height": 32, "width": 32, "num_frames": 9}
LTX = entries(
    _ltx,
    {
        "LTXPipeline": (same, _LTX),
        "LTXImageToVideoPipeline": (same, {"image": PICTURE, **_LTX, **ONE}),
        "LTXConditionPipeline": (same, {"image": PICTURE, **_LTX, **ONE}),
    },
)


def _latte() -> dict[str, Any]:
    from diffusers import DDIMScheduler

    model = made(
        "LatteTransformer3DModel",
        sample_size=8,
        num_layers=1,
        patch_size=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
        **_HEADS,
    )
    return {
        "transformer": model,
        "vae": tiny.vae(),
        "scheduler": DDIMScheduler(),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
    }


def _vae_allegro() -> Any:
    return made(
        "AutoencoderKLAllegro",
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        temporal_downsample_blocks=(True, True, False, False),
        temporal_upsample_blocks=(False, True, True, False),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_size=32,
    )


def _allegro(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    model = made(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    return {"transformer": model, "vae": _vae_allegro(), "scheduler": DDIMScheduler()}


def _mochi(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=MAX_WORDS,
    )
    vae = made(
        "AutoencoderKLMochi",
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return {"transformer": model, "vae": vae, "scheduler": flow()}


def hunyuan_vae(latents: int = 4) -> Any:
    """HunyuanVideo's VAE."""
    return made(
        "AutoencoderKLHunyuanVideo",
        latent_channels=latents,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def _hunyuan(channels: int) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        model = made(
            "HunyuanVideoTransformer3DModel",
            in_channels=channels,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            guidance_embeds=True,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(2, 2, 4),
            **_HEADS,
        )
        return {
            "transformer": model,
            "vae": hunyuan_vae(),
            "scheduler": flow(),
            "text_encoder": tiny.language_model("LlamaModel", num_hidden_layers=3),
            "tokenizer": tiny.chat_tokenizer(),
            "text_encoder_2": tiny.clip(max_position_embeddings=77),
            "tokenizer_2": new_tokenizer(causal=True),
        }

    return change


def _sana_video(_: dict[str, Any]) -> dict[str, Any]:
    model = made(
        "SanaVideoTransformer3DModel",
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return {
        "transformer": model,
        "vae": tiny.vae_wan(16),
        "scheduler": flow(),
        "text_encoder": tiny.language_model("Gemma2Model"),
        "tokenizer": new_tokenizer(causal=True),
    }


_PROMPT_TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
OTHERS = entries(
    _latte,
    {
        "LattePipeline": (same, {**SIZE, "video_length": 2}),
        "AllegroPipeline": (_allegro, {**SIZE, "num_frames": 8}),
        "MochiPipeline": (_mochi, {**SIZE, "num_frames": 7}),
        "HunyuanVideoPipeline": (_hunyuan(4), {**_CLIP, **_PROMPT_TEMPLATE}),
        "HunyuanSkyreelsImageToVideoPipeline": (
            _hunyuan(8),
            {"image": PICTURE, **_CLIP, **_PROMPT_TEMPLATE, **ONE},
        ),
        "SanaVideoPipeline": (_sana_video, {"height": 32, "width": 32, "frames": 5}),
        "SanaImageToVideoPipeline": (
            _sana_video,
            {"image": PICTURE, "height": 32, "width": 32, "frames": 5, **ONE},
        ),
    },
)


def animated(motion_mid_block: bool = True) -> dict[str, Any]:
    """Stable Diffusion with a motion adapter."""
    from diffusers import DDIMScheduler, MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=motion_mid_block,
    )
    return {
        "unet": tiny.unet(cross_attention_dim=WIDTH, attention_head_dim=2),
        "vae": tiny.vae(),
        "text_encoder": tiny.clip(),
        "tokenizer": new_tokenizer(causal=True),
        "scheduler": DDIMScheduler(beta_schedule="linear", clip_sample=False),
        "motion_adapter": adapter,
        **UNCHECKED,
    }


def _animated_control(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import ControlNetModel

    return {
        "controlnet": ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(4, 8)
        )
    }


def _sparse(_: dict[str, Any]) -> dict[str, Any]:
    net = made(
        "SparseControlNetModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        conditioning_channels=3,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
        attention_head_dim=2,
        motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(4, 8),
        concat_conditioning_mask=True,
        use_simplified_condition_embedding=False,
    )
    return {"controlnet": net}


_FIVE = {"conditioning_frames": VIDEO, "num_frames": 5, **SIZE}
ANIMATED = entries(
    animated,
    {
        "AnimateDiffPipeline": (same, {"num_frames": 4}),
        "AnimateDiffPAGPipeline": (same, {"num_frames": 4}),
        "AnimateDiffVideoToVideoPipeline": (same, {"video": VIDEO}),
        "AnimateDiffControlNetPipeline": (_animated_control, {**_FIVE, **ONE}),
        "AnimateDiffVideoToVideoControlNetPipeline": (
            _animated_control,
            {"video": VIDEO, "conditioning_frames": VIDEO},
        ),
        "AnimateDiffSparseControlNetPipeline": (
            _sparse,
            {"conditioning_frames": PICTURE, "num_frames": 2, **SIZE},
        ),
    },
)


def _svd() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    unet = made(
        "UNetSpatioTemporalConditionModel",
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    vae = made(
        "AutoencoderKLTemporalDecoder",
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
    )
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
        steps_offset=1,
        timestep_spacing="leading",
    )
    return {
        "unet": unet,
        "vae": vae,
        "image_encoder": tiny.clip_vision(side=224),
        "feature_extractor": tiny.clip_processor(),
        "scheduler": scheduler,
    }


def _stable_audio() -> dict[str, Any]:
    from diffusers import EDMDPMSolverMultistepScheduler
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    model = made(
        "StableAudioDiTModel",
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = made(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return {
        "transformer": model,
        "vae": vae,
        "text_encoder": tiny.t5(8),
        "tokenizer": new_tokenizer(causal=False),
        "projection_model": StableAudioProjectionModel(
            text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32
        ),
        "scheduler": EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_max=500.0
        ),
    }


SINGLE = {
    **entries(
        _svd,
        {
            "StableVideoDiffusionPipeline": (
                same,
                {"image": PICTURE, **SIZE, "num_frames": 2, "decode_chunk_size": 2, **ONE},
            )
        },
    ),
    **entries(
        _stable_audio,
        {"StableAudioPipeline": (same, {"audio_end_in_s": 2.0})},
    ),
}

PIPELINES: dict[str, Entry] = {**COGVIDEOX, **WAN, **LTX, **OTHERS, **ANIMATED, **SINGLE}
