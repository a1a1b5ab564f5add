"""Tiny pipelines of the census that make pictures with a transformer: SD3, Flux, PixArt, Sana,
Z-Image, Qwen-Image and others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from census_inputs import LARGE, MASK, OTHER, PICTURE, SIZE, Change, Entry, entries, same

from qsearch.zoo.painters import MAX_WORDS, new_tokenizer
from tests import tiny_parts as tiny
from tests import tiny_pipelines
from tests.tiny_parts import WIDTH

_32 = {"height": 32, "width": 32}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_INPAINT = {"image": PICTURE, "mask_image": MASK}


def parts_of(name: str) -> Callable[[], dict[str, Any]]:
    """The parts of one of the tests' tiny pipelines."""
    return lambda: dict(tiny_pipelines.BUILDERS[name]().components)


def flow(**more: Any) -> Any:
    """Euler's scheduler of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def _deeper(layer: str) -> Change:
    """Two blocks, with perturbed-attention guidance in the one that pipelines take by themselves:
    their saved folders do not say which.
    """

    def change(parts: dict[str, Any]) -> dict[str, Any]:
        model = parts["transformer"]
        config = {**model.config, "num_layers": 2}
        return {
            "transformer": type(model).from_config(config),
            "pag_applied_layers": layer,
        }

    return change


def _sd3_wide(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        pos_embed_max_size=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        **_HEADS,
    )
    return {"transformer": model, "vae": tiny.vae(16)}


def _sd3_control(extra: int) -> Change:
    def change(parts: dict[str, Any]) -> dict[str, Any]:
        from diffusers import SD3ControlNetModel

        config = dict(parts["transformer"].config)
        known = (
            "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads "
            "joint_attention_dim caption_projection_dim pooled_projection_dim out_channels "
            "pos_embed_max_size"
        )
        given = {k: config[k] for k in known.split()}
        return {"controlnet": SD3ControlNetModel(**given, extra_conditioning_channels=extra)}

    return change


SD3 = entries(
    parts_of("stable_diffusion_3"),
    {
        "StableDiffusion3Pipeline": (same, _32),
        "StableDiffusion3Img2ImgPipeline": (same, {"image": PICTURE, **SIZE}),
        "StableDiffusion3InpaintPipeline": (_sd3_wide, {**_INPAINT, **SIZE}),
        "StableDiffusion3ControlNetPipeline": (_sd3_control(0), {"control_image": PICTURE, **SIZE}),
        "StableDiffusion3ControlNetInpaintingPipeline": (
            _sd3_control(1),
            {"control_image": PICTURE, "control_mask": MASK, **SIZE},
        ),
        "StableDiffusion3PAGPipeline": (_deeper("blocks.1"), _32),
        "StableDiffusion3PAGImg2ImgPipeline": (
            _deeper("blocks.1"),
            {"image": PICTURE, **SIZE},
        ),
    },
)


def _flux(channels: int) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(
            in_channels=channels,
            out_channels=32,
            num_layers=1,
            num_single_layers=1,
            guidance_embeds=True,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            **_HEADS,
        )
        return {"transformer": model}

    return change


def _flux_controlnet(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import FluxControlNetModel

    return {
        "controlnet": FluxControlNetModel(
            in_channels=32,
            num_layers=1,
            num_single_layers=1,
            guidance_embeds=True,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[2, 2, 4],
            **_HEADS,
        )
    }


FLUX = entries(
    parts_of("flux"),
    {
        "FluxPipeline": (same, {**_32, "true_cfg_scale": 2.0, "negative_prompt": "a blue square"}),
        "FluxImg2ImgPipeline": (same, {"image": PICTURE, **SIZE}),
        "FluxInpaintPipeline": (same, {**_INPAINT, **SIZE}),
        "FluxControlPipeline": (_flux(64), {"control_image": PICTURE, **SIZE}),
        "FluxControlImg2ImgPipeline": (
            _flux(64),
            {"image": OTHER, "control_image": PICTURE, **SIZE},
        ),
        "FluxControlInpaintPipeline": (_flux(64), {**_INPAINT, "control_image": OTHER, **SIZE}),
        "FluxControlNetPipeline": (_flux_controlnet, {"control_image": PICTURE, **SIZE}),
        "FluxControlNetImg2ImgPipeline": (
            _flux_controlnet,
            {"image": OTHER, "control_image": PICTURE, **SIZE},
        ),
        "FluxControlNetInpaintPipeline": (
            _flux_controlnet,
            {**_INPAINT, "control_image": OTHER, **SIZE},
        ),
        "FluxFillPipeline": (_flux(80), {**_INPAINT, **SIZE}),
        "FluxKontextPipeline": (
            same,
            {"image": PICTURE, **SIZE, "max_area": 256, "_auto_resize": False},
        ),
        "FluxKontextInpaintPipeline": (
            same,
            {**_INPAINT, **SIZE, "max_area": 256, "_auto_resize": False},
        ),
    },
)

PIXART = entries(
    parts_of("pixart_sigma"),
    {
        "PixArtAlphaPipeline": (same, SIZE),
        "PixArtSigmaPipeline": (same, SIZE),
        "PixArtSigmaPAGPipeline": (_deeper("blocks.1"), SIZE),
    },
)


def _hunyuan_control(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import HunyuanDiT2DControlNetModel

    config = parts["transformer"].config
    known = (
        "sample_size patch_size in_channels hidden_size num_attention_heads attention_head_dim "
        "cross_attention_dim cross_attention_dim_t5 pooled_projection_dim activation_fn text_len "
        "text_len_t5"
    )
    more = {"conditioning_channels": 3, "transformer_num_layers": 2}
    return {
        "controlnet": HunyuanDiT2DControlNetModel(**{k: config[k] for k in known.split()}, **more)
    }


HUNYUAN = entries(
    parts_of("hunyuan_dit"),
    {
        "HunyuanDiTPipeline": (same, SIZE),
        "HunyuanDiTPAGPipeline": (lambda _: {"pag_applied_layers": "blocks.1"}, SIZE),
        "HunyuanDiTControlNetPipeline": (_hunyuan_control, {"control_image": PICTURE, **SIZE}),
    },
)


def _sana_sprint(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import SanaTransformer2DModel, SCMScheduler

    model = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        caption_channels=WIDTH,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        **_HEADS,
    )
    return {"transformer": model, "scheduler": SCMScheduler()}


def _sana_control(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import SanaControlNetModel

    net = SanaControlNetModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        caption_channels=WIDTH,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        **_HEADS,
    )
    return {"controlnet": net}


SANA = entries(
    parts_of("sana"),
    {
        "SanaPipeline": (same, _32),
        "SanaPAGPipeline": (lambda _: {"pag_applied_layers": "blocks.0", "scheduler": flow()}, _32),
        "SanaSprintPipeline": (_sana_sprint, {**_32, "intermediate_timesteps": None}),
        "SanaSprintImg2ImgPipeline": (
            _sana_sprint,
            {**_32, "image": LARGE, "intermediate_timesteps": None},
        ),
        "SanaControlNetPipeline": (_sana_control, {**_32, "control_image": LARGE}),
    },
)


def _z_vae(_: dict[str, Any]) -> dict[str, Any]:
    return {"vae": tiny.vae(shift_factor=0.1)}


def _z_control(channels: int) -> Change:
    def change(parts: dict[str, Any]) -> dict[str, Any]:
        from diffusers import ZImageControlNetModel

        net = ZImageControlNetModel(
            control_layers_places=[0, 1],
            control_refiner_layers_places=[0],
            control_in_dim=channels,
            add_control_noise_refiner="control_noise_refiner",
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
        return {"controlnet": net, **_z_vae(parts)}

    return change


Z_IMAGE = entries(
    parts_of("z_image"),
    {
        "ZImagePipeline": (same, _32),
        "ZImageImg2ImgPipeline": (_z_vae, {"image": PICTURE, **SIZE}),
        "ZImageInpaintPipeline": (_z_vae, {**_INPAINT, **SIZE}),
        "ZImageControlNetPipeline": (_z_control(4), {"control_image": PICTURE, **SIZE}),
        "ZImageControlNetInpaintPipeline": (
            _z_control(9),
            {**_INPAINT, "control_image": OTHER, **SIZE},
        ),
    },
)


def _simple(model: str, config: dict[str, Any], **parts: Callable[[], Any]) -> Change:
    """A transformer by its class and configuration, and further parts by their builders."""

    def change(_: dict[str, Any]) -> dict[str, Any]:
        import diffusers

        made = getattr(diffusers, model)(**config)
        return {"transformer": made, **{name: part() for name, part in parts.items()}}

    return change


def _plain() -> dict[str, Any]:
    return {
        "scheduler": flow(),
        "vae": tiny.vae(),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
    }


def _cogvideox_ddim() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(prediction_type="v_prediction")


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler()


def _dynamic() -> Any:
    return flow(
        use_dynamic_shifting=True,
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=16,
        time_shift_type="linear",
    )


_COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "sample_size": 8,
    "pos_embed_max_size": 8,
    **_HEADS,
}
_LUMINA = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "num_layers": 2,
}
_CHROMA = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (2, 2, 4),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
    **_HEADS,
}
_chroma = _simple("ChromaTransformer2DModel", _CHROMA, vae=lambda: tiny.vae(shift_factor=0.1))
_QWEN = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 2, 2),
    **_HEADS,
}


#: rotary positions in time, height and width, of heads of 8 channels
MROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}


def qwen_vl(name: str = "Qwen2_5_VLForConditionalGeneration", layers: int = 2) -> Any:
    """A vision-language model of Qwen's by its class, whose text model reads prompts."""
    import transformers

    tokenizer = tiny.vision_tokenizer()
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": MROPE,
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    words = {"image": tiny.IMAGE_WORD, "video": tiny.VIDEO_WORD, "vision_start": "<|vision_start|>"}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(word) for name, word in words.items()
    }
    made = getattr(transformers, name)
    config = made.config_class(text_config=text, vision_config=vision, **ids)
    return made(config)


def _vae_qwen() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


_qwen = _simple(
    "QwenImageTransformer2DModel",
    _QWEN,
    vae=_vae_qwen,
    text_encoder=qwen_vl,
    tokenizer=tiny.chat_tokenizer,
)


def _qwen_control(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import QwenImageControlNetModel

    return {**_qwen(parts), "controlnet": QwenImageControlNetModel(**{**_QWEN, "num_layers": 1})}


def _qwen_inpaint_control(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import QwenImageControlNetModel

    config = {**_QWEN, "num_layers": 1, "extra_condition_channels": 4}
    return {**_qwen(parts), "controlnet": QwenImageControlNetModel(**config)}


#: a small Flux 2 transformer
FLUX2 = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 3 * WIDTH,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
    "guidance_embeds": False,
    **_HEADS,
}
_klein = _simple(
    "Flux2Transformer2DModel",
    FLUX2,
    vae=tiny.vae_flux2,
    text_encoder=lambda: tiny.language_model("Qwen3ForCausalLM", num_hidden_layers=3),
    tokenizer=tiny.chat_tokenizer,
)
_LAYERS = {"text_encoder_out_layers": [1, 2, 3], "max_sequence_length": MAX_WORDS}
_TRUE = {"true_cfg_scale": 2.0, "negative_prompt": "a blue square"}

OTHERS = entries(
    _plain,
    {
        "CogView3PlusPipeline": (
            _simple("CogView3PlusTransformer2DModel", _COGVIEW, scheduler=_cogvideox_ddim),
            SIZE,
        ),
        "CogView4Pipeline": (
            _simple(
                "CogView4Transformer2DModel",
                {**_COGVIEW, "rope_axes_dim": (8, 8)},
                scheduler=_dynamic,
                text_encoder=lambda: tiny.language_model("GlmModel"),
                tokenizer=tiny.chat_tokenizer,
            ),
            SIZE,
        ),
        "CogView4ControlPipeline": (
            _simple(
                "CogView4Transformer2DModel",
                {**_COGVIEW, "rope_axes_dim": (8, 8), "in_channels": 8},
                scheduler=_dynamic,
                text_encoder=lambda: tiny.language_model("GlmModel"),
                tokenizer=tiny.chat_tokenizer,
            ),
            {"control_image": PICTURE, **SIZE},
        ),
        "LuminaPipeline": (
            _simple(
                "LuminaNextDiT2DModel",
                {**_LUMINA, "cross_attention_dim": WIDTH, "scaling_factor": 1.0},
                text_encoder=lambda: tiny.language_model("GemmaModel"),
                tokenizer=lambda: new_tokenizer(causal=True),
            ),
            SIZE,
        ),
        "Lumina2Pipeline": (
            _simple(
                "Lumina2Transformer2DModel",
                {
                    **_LUMINA,
                    "num_refiner_layers": 1,
                    "axes_dim_rope": (4, 2, 2),
                    "axes_lens": (64, 32, 32),
                    "cap_feat_dim": WIDTH,
                },
                text_encoder=lambda: tiny.language_model("Gemma2Model"),
                tokenizer=lambda: new_tokenizer(causal=True),
            ),
            SIZE,
        ),
        "ChromaPipeline": (_chroma, {**SIZE, "negative_prompt": "a blue square"}),
        "ChromaImg2ImgPipeline": (
            _chroma,
            {"image": PICTURE, **SIZE, "negative_prompt": "a blue square"},
        ),
        "BriaPipeline": (
            _simple(
                "BriaTransformer2DModel",
                {
                    "in_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "joint_attention_dim": WIDTH,
                    "axes_dims_rope": [2, 2, 4],
                    **_HEADS,
                },
                scheduler=_ddim,
            ),
            SIZE,
        ),
        "BriaFiboPipeline": (
            _simple(
                "BriaFiboTransformer2DModel",
                {
                    "in_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "joint_attention_dim": 2 * WIDTH,
                    "text_encoder_dim": WIDTH,
                    "axes_dims_rope": [2, 2, 4],
                    **_HEADS,
                },
                vae=lambda: tiny.vae_wan(16),
                text_encoder=lambda: tiny.language_model("SmolLM3ForCausalLM", vocab_size=128_256),
                tokenizer=lambda: new_tokenizer(causal=True),
            ),
            _32,
        ),
        "OvisImagePipeline": (
            _simple(
                "OvisImageTransformer2DModel",
                {
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 1,
                    "num_single_layers": 1,
                    "joint_attention_dim": WIDTH,
                    "axes_dims_rope": (2, 2, 4),
                    **_HEADS,
                },
                text_encoder=lambda: tiny.language_model("Qwen3Model"),
                tokenizer=tiny.chat_tokenizer,
            ),
            SIZE,
        ),
        "Flux2KleinPipeline": (_klein, {**SIZE, **_LAYERS}),
        "Flux2KleinKVPipeline": (_klein, {**SIZE, **_LAYERS, "image": LARGE}),
        "Flux2KleinInpaintPipeline": (_klein, {**SIZE, **_LAYERS, **_INPAINT}),
        "QwenImagePipeline": (_qwen, {**_32, **_TRUE}),
        "QwenImageImg2ImgPipeline": (_qwen, {"image": LARGE, **_32, **_TRUE}),
        "QwenImageInpaintPipeline": (
            _qwen,
            {"image": LARGE, "mask_image": MASK, **_32, **_TRUE},
        ),
        "QwenImageControlNetPipeline": (_qwen_control, {"control_image": LARGE, **_32, **_TRUE}),
        "QwenImageControlNetInpaintPipeline": (
            _qwen_inpaint_control,
            {"control_image": LARGE, "control_mask": MASK, **_32, **_TRUE},
        ),
    },
)

PIPELINES: dict[str, Entry] = {
    **SD3,
    **FLUX,
    **PIXART,
    **HUNYUAN,
    **SANA,
    **Z_IMAGE,
    **entries(parts_of("auraflow"), {"AuraFlowPipeline": (same, SIZE)}),
    **OTHERS,
}
