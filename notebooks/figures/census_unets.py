"""Tiny pipelines of the census whose denoiser is a U-Net: Stable Diffusion and XL with all that
goes with them, DeepFloyd, Kandinsky.

A table: the pipeline's class -> how it is built, and what its call wants besides a prompt. A name
of a picture, a video or a tensor stands for a file of `census_inputs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from census_inputs import MASK, ONE, OTHER, PICTURE, SIZE, Change, Entry, entries, same

from qsearch.zoo.painters import new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import UNCHECKED, WIDTH

_CROSS = {"cross_attention_dim": WIDTH, "attention_head_dim": 2}


def _stable_diffusion() -> dict[str, Any]:
    from diffusers import DDIMScheduler

    return {
        "unet": tiny.unet(**_CROSS),
        "vae": tiny.vae(),
        "text_encoder": tiny.clip(),
        "tokenizer": new_tokenizer(causal=True),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        **UNCHECKED,
    }


def _controlnet(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import ControlNetModel

    return {
        "controlnet": ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(4, 8)
        )
    }


def _union(parts: dict[str, Any]) -> dict[str, Any]:
    from diffusers import ControlNetUnionModel

    more = {k: v for k, v in _TIME_AND_TEXT.items() if k != "attention_head_dim"}
    net = ControlNetUnionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        conditioning_embedding_out_channels=(4, 8),
        num_trans_channel=8,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=8,
        **more,
    )
    return {"controlnet": net}


#: U-Nets whose first level has cross-attention
_ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def _adapter(**more: Any) -> Change:
    def change(_: dict[str, Any]) -> dict[str, Any]:
        from diffusers import T2IAdapter

        adapter = T2IAdapter(
            in_channels=3,
            channels=[8, 16],
            num_res_blocks=1,
            downscale_factor=2,
            adapter_type="full_adapter",
        )
        return {"adapter": adapter, "unet": tiny.unet(**_ATTENTION_FIRST, **more)}

    return change


def _lcm(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import LCMScheduler

    return {"unet": tiny.unet(**_CROSS, time_cond_proj_dim=8), "scheduler": LCMScheduler()}


def _vision(_: dict[str, Any]) -> dict[str, Any]:
    return {"image_encoder": tiny.clip_vision(), "feature_extractor": tiny.clip_processor()}


def _upscale(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import DDIMScheduler, DDPMScheduler

    net = tiny.unet(**_CROSS, in_channels=7, num_class_embeds=1000)
    ddim = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return {"unet": net, "low_res_scheduler": DDPMScheduler(), "scheduler": ddim}


def _latent_upscale(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    net = UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=128 + WIDTH,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=WIDTH,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        in_channels=8,
        out_channels=5,
        layers_per_block=1,
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
    )
    return {"unet": net, "scheduler": EulerDiscreteScheduler(prediction_type="sample")}


def _wide(channels: int, **more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {"unet": tiny.unet(**_CROSS, in_channels=channels, out_channels=4, **more)}


def _depth(_: dict[str, Any]) -> dict[str, Any]:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        backbone_out_indices=[0, 1, 2, 3],
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    processor = DPTImageProcessor(size={"height": 32, "width": 32})
    return {
        "unet": tiny.unet(**_CROSS, in_channels=5, out_channels=4),
        "depth_estimator": DPTForDepthEstimation(config),
        "feature_extractor": processor,
    }


def _marigold(channels: int, out: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    more = {"default_denoising_steps": 2, "default_processing_resolution": 16}
    return lambda _: {
        "unet": tiny.unet(**_CROSS, in_channels=channels, out_channels=out),
        **more,
    }


def _unclip(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    kinds = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}
    return {
        "unet": tiny.unet(**_CROSS, **kinds),
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "scheduler": DDIMScheduler(prediction_type="v_prediction"),
        "image_encoder": tiny.clip_vision(),
        "feature_extractor": tiny.clip_processor(),
        "prior": _prior_transformer(),
        "prior_tokenizer": new_tokenizer(causal=True),
        "prior_text_encoder": tiny.clip(True),
        "prior_scheduler": _unclip_scheduler(),
    }


def _prior_transformer() -> Any:
    from diffusers import PriorTransformer

    return PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=WIDTH,
        num_layers=1,
        num_embeddings=36,
        additional_embeddings=4,
    )


def _unclip_scheduler() -> Any:
    from diffusers import UnCLIPScheduler

    return UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        num_train_timesteps=1000,
        clip_sample_range=5.0,
    )


def _xs(_: dict[str, Any]) -> dict[str, Any]:
    from diffusers import ControlNetXSAdapter

    unet = tiny.unet(
        **_CROSS, **_ATTENTION_FIRST | {"layers_per_block": 2, "use_linear_projection": True}
    )
    net = ControlNetXSAdapter.from_unet(
        unet, size_ratio=1, conditioning_embedding_out_channels=(4, 8), num_attention_heads=2
    )
    return {"unet": unet, "controlnet": net}


STABLE_DIFFUSION = entries(
    _stable_diffusion,
    {
        "StableDiffusionPipeline": (same, {"negative_prompt": "a blue square"}),
        "StableDiffusionImg2ImgPipeline": (same, {"image": PICTURE, "strength": 0.75}),
        "StableDiffusionInpaintPipeline": (
            _wide(9),
            {"image": PICTURE, "mask_image": MASK, **SIZE},
        ),
        "StableDiffusionInstructPix2PixPipeline": (_wide(8), {"image": PICTURE}),
        "StableDiffusionDepth2ImgPipeline": (_depth, {"image": "large.png"}),
        "StableDiffusionImageVariationPipeline": (_vision, {"image": PICTURE}),
        "StableDiffusionUpscalePipeline": (_upscale, {"image": PICTURE}),
        "StableDiffusionLatentUpscalePipeline": (_latent_upscale, {"image": "large.png"}),
        "StableDiffusionControlNetPipeline": (_controlnet, {"image": PICTURE}),
        "StableDiffusionControlNetImg2ImgPipeline": (
            _controlnet,
            {"image": PICTURE, "control_image": OTHER},
        ),
        "StableDiffusionControlNetInpaintPipeline": (
            _controlnet,
            {"image": PICTURE, "mask_image": MASK, "control_image": OTHER},
        ),
        "StableDiffusionControlNetPAGPipeline": (_controlnet, {"image": PICTURE}),
        "StableDiffusionControlNetPAGInpaintPipeline": (
            _controlnet,
            {"image": PICTURE, "mask_image": MASK, "control_image": OTHER},
        ),
        "StableDiffusionPAGPipeline": (same, {"pag_scale": 2.0}),
        "StableDiffusionPAGImg2ImgPipeline": (same, {"image": PICTURE}),
        "StableDiffusionPAGInpaintPipeline": (same, {"image": PICTURE, "mask_image": MASK}),
        "StableDiffusionAdapterPipeline": (
            _adapter(**_CROSS),
            {"image": PICTURE, **SIZE},
        ),
        "LatentConsistencyModelPipeline": (_lcm, {}),
        "LatentConsistencyModelImg2ImgPipeline": (_lcm, {"image": PICTURE}),
        "StableUnCLIPPipeline": (_unclip, {"prior_num_inference_steps": 2}),
        "StableUnCLIPImg2ImgPipeline": (_unclip, {"image": PICTURE}),
        "MarigoldDepthPipeline": (_marigold(8, 4), {"image": PICTURE}),
        "MarigoldNormalsPipeline": (_marigold(8, 4), {"image": PICTURE}),
        "MarigoldIntrinsicsPipeline": (_marigold(12, 8), {"image": PICTURE}),
        "StableDiffusionPanoramaPipeline": (same, {**SIZE}),
        "StableDiffusionSAGPipeline": (same, {**SIZE}),
        "SemanticStableDiffusionPipeline": (same, {"editing_prompt": "blue"}),
        "StableDiffusionLDM3DPipeline": (
            lambda _: {"vae": tiny.vae(in_channels=6, out_channels=6)},
            {},
        ),
        "StableDiffusionControlNetXSPipeline": (
            _xs,
            {"image": PICTURE},
        ),
        "TextToVideoZeroPipeline": (same, {"video_length": 2, "t0": 0, "t1": 1, **ONE}),
    },
)


_TIME_AND_TEXT = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}


def _xl() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    return {
        "unet": tiny.unet(**_TIME_AND_TEXT),
        "vae": tiny.vae(),
        "scheduler": EulerDiscreteScheduler(),
        "text_encoder": tiny.clip(),
        "text_encoder_2": tiny.clip(True),
        "tokenizer": new_tokenizer(causal=True),
        "tokenizer_2": new_tokenizer(causal=True),
        "add_watermarker": False,
    }


XL = entries(
    _xl,
    {
        "StableDiffusionXLPipeline": (same, {}),
        "StableDiffusionXLImg2ImgPipeline": (same, {"image": PICTURE, "strength": 0.75}),
        "StableDiffusionXLInpaintPipeline": (
            lambda _: {"unet": tiny.unet(**_TIME_AND_TEXT, in_channels=9, out_channels=4)},
            {"image": PICTURE, "mask_image": MASK, "strength": 0.75, **SIZE},
        ),
        "StableDiffusionXLInstructPix2PixPipeline": (
            lambda _: {"unet": tiny.unet(**_TIME_AND_TEXT, in_channels=8, out_channels=4)},
            {"image": PICTURE, **SIZE},
        ),
        "StableDiffusionXLControlNetPipeline": (_controlnet, {"image": PICTURE}),
        "StableDiffusionXLControlNetImg2ImgPipeline": (
            _controlnet,
            {"image": PICTURE, "control_image": OTHER},
        ),
        "StableDiffusionXLControlNetInpaintPipeline": (
            _controlnet,
            {"image": PICTURE, "mask_image": MASK, "control_image": OTHER},
        ),
        "StableDiffusionXLControlNetUnionPipeline": (
            _union,
            {"control_image": PICTURE, "control_mode": [1], "height": 64, "width": 64, **ONE},
        ),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": (
            _union,
            {"image": "large.png", "control_image": "large.png", "control_mode": [1], **ONE},
        ),
        "StableDiffusionXLControlNetUnionInpaintPipeline": (
            _union,
            {
                "image": "large.png",
                "mask_image": MASK,
                "control_image": "large.png",
                "control_mode": [1],
                **ONE,
            },
        ),
        "StableDiffusionXLPAGPipeline": (same, {"pag_scale": 2.0}),
        "StableDiffusionXLPAGImg2ImgPipeline": (same, {"image": PICTURE, "strength": 0.75}),
        "StableDiffusionXLPAGInpaintPipeline": (same, {"image": PICTURE, "mask_image": MASK}),
        "StableDiffusionXLControlNetPAGPipeline": (_controlnet, {"image": PICTURE}),
        "StableDiffusionXLControlNetPAGImg2ImgPipeline": (
            _controlnet,
            {"image": PICTURE, "control_image": OTHER},
        ),
        "StableDiffusionXLAdapterPipeline": (
            _adapter(**_TIME_AND_TEXT),
            {"image": PICTURE, **SIZE},
        ),
    },
)


def _floyd() -> dict[str, Any]:
    from diffusers import DDPMScheduler

    kinds = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "encoder_hid_dim": WIDTH,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "act_fn": "gelu",
        "out_channels": 6,
    }
    steps = {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"}
    return {
        "unet": tiny.unet(**kinds, in_channels=3),
        "super": lambda: tiny.unet(
            **kinds, in_channels=6, class_embed_type="timestep", class_embeddings_concat=False
        ),
        "scheduler": DDPMScheduler(**steps, prediction_type="epsilon"),
        "image_noising_scheduler": DDPMScheduler(),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
        "watermarker": None,
        **UNCHECKED,
    }


def _super(parts: dict[str, Any]) -> dict[str, Any]:
    return {"unet": parts["super"]()}


_TWO = {"image": PICTURE, "original_image": OTHER}
FLOYD = entries(
    _floyd,
    {
        "IFPipeline": (same, {}),
        "IFImg2ImgPipeline": (same, {"image": PICTURE}),
        "IFInpaintingPipeline": (same, {"image": PICTURE, "mask_image": MASK}),
        "IFSuperResolutionPipeline": (_super, {"image": PICTURE, **SIZE}),
        "IFImg2ImgSuperResolutionPipeline": (_super, _TWO),
        "IFInpaintingSuperResolutionPipeline": (_super, {**_TWO, "mask_image": MASK}),
    },
)

PIPELINES: dict[str, Entry] = {**STABLE_DIFFUSION, **XL, **FLOYD}
