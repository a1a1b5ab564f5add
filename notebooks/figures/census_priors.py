"""Tiny pipelines of the census without a text, or with a prior before them: DDPM, DiT, Kandinsky,
Stable Cascade, latent diffusion.
"""

from __future__ import annotations

from typing import Any

from census_inputs import MASK, ONE, PICTURE, SIZE, Entry, entries, same

from qsearch.zoo.painters import new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH

EMBEDS, NEGATIVE, HINT = "embeds.safetensors", "negative_embeds.safetensors", "hint.safetensors"
_GIVEN = {"image_embeds": EMBEDS, "negative_image_embeds": NEGATIVE, **SIZE}


def _plain_unet(**more: Any) -> Any:
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**config | more)


def _ddpm() -> dict[str, Any]:
    from diffusers import DDPMScheduler

    return {"unet": _plain_unet(), "scheduler": DDPMScheduler()}


def _scheduler(name: str, **more: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**more)


UNCONDITIONAL = entries(
    _ddpm,
    {
        "DDPMPipeline": (same, {}),
        "DDIMPipeline": (lambda _: {"scheduler": _scheduler("DDIMScheduler")}, {}),
        "ConsistencyModelPipeline": (
            lambda _: {
                "unet": _plain_unet(num_class_embeds=10),
                "scheduler": _scheduler(
                    "CMStochasticIterativeScheduler",
                    num_train_timesteps=40,
                    sigma_min=0.002,
                    sigma_max=80.0,
                ),
            },
            {},
        ),
        "LDMSuperResolutionPipeline": (
            lambda _: {
                "unet": _plain_unet(in_channels=6),
                "vqvae": tiny.vqvae(latents=3),
                "scheduler": _scheduler("DDIMScheduler"),
            },
            {"image": "large.png", **ONE},
        ),
    },
)


def _dit() -> dict[str, Any]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return {"transformer": model, "vae": tiny.vae(), "scheduler": _scheduler("DDIMScheduler")}


def _latent() -> dict[str, Any]:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(new_tokenizer(causal=False)),
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=WIDTH,
            pad_token_id=0,
        )
    )
    return {
        "unet": tiny.unet(cross_attention_dim=WIDTH, attention_head_dim=2),
        "vqvae": tiny.vae(),
        "bert": bert,
        "tokenizer": new_tokenizer(causal=False),
        "scheduler": _scheduler("DDIMScheduler", clip_sample=False),
    }


def _kandinsky22() -> dict[str, Any]:
    return {
        "unet": _k22(4, "image"),
        "movq": tiny.vqvae("spatial"),
        "scheduler": _scheduler(
            "DDIMScheduler",
            beta_schedule="linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            thresholding=False,
        ),
    }


def _k22(channels: int, kind: str) -> Any:
    return tiny.unet(
        in_channels=channels,
        out_channels=8,
        addition_embed_type=kind,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )


_KANDINSKY22 = {
    "KandinskyV22Pipeline": (same, _GIVEN),
    "KandinskyV22Img2ImgPipeline": (same, {**_GIVEN, "image": PICTURE, "strength": 0.8}),
    "KandinskyV22InpaintPipeline": (
        lambda _: {"unet": _k22(9, "image")},
        {**_GIVEN, "image": PICTURE, "mask_image": MASK},
    ),
    "KandinskyV22ControlnetPipeline": (
        lambda _: {"unet": _k22(8, "image_hint")},
        {**_GIVEN, "hint": HINT},
    ),
    "KandinskyV22ControlnetImg2ImgPipeline": (
        lambda _: {"unet": _k22(8, "image_hint")},
        {**_GIVEN, "hint": HINT, "image": PICTURE, "strength": 0.8},
    ),
}


def _prior() -> dict[str, Any]:
    import torch
    from diffusers import PriorTransformer

    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=WIDTH,
        num_layers=1,
        num_embeddings=36,
        additional_embeddings=4,
    )
    prior.clip_std = torch.nn.Parameter(torch.ones(prior.clip_std.shape))
    return {
        "prior": prior,
        "image_encoder": tiny.clip_vision(),
        "text_encoder": tiny.clip(True),
        "tokenizer": new_tokenizer(causal=True),
        "image_processor": tiny.clip_processor(),
        "scheduler": _scheduler(
            "UnCLIPScheduler",
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=10.0,
        ),
    }


def _k21(channels: int) -> Any:
    return tiny.unet(
        in_channels=channels,
        out_channels=8,
        addition_embed_type="text_image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_image_proj",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )


def _kandinsky21() -> dict[str, Any]:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=WIDTH,
        transformerDimensions=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(new_tokenizer(causal=False)),
    )
    return {
        **_kandinsky22(),
        "unet": _k21(4),
        "text_encoder": MultilingualCLIP(config),
        "tokenizer": new_tokenizer(causal=False),
    }


def _kandinsky3() -> dict[str, Any]:
    from diffusers import Kandinsky3UNet

    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )
    return {
        "unet": unet,
        "movq": tiny.vqvae("spatial"),
        "text_encoder": tiny.t5(),
        "tokenizer": new_tokenizer(causal=False),
        "scheduler": _scheduler(
            "DDPMScheduler",
            beta_schedule="squaredcos_cap_v2",
            clip_sample=True,
            thresholding=False,
        ),
    }


def _cascade() -> dict[str, Any]:
    from diffusers.models import StableCascadeUNet

    def unet(**more: Any) -> Any:
        config = {
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": WIDTH,
            "dropout": (0.0, 0.0),
        }
        return StableCascadeUNet(**config | more)

    prior = unet(
        clip_text_in_channels=WIDTH,
        clip_image_in_channels=WIDTH,
        switch_level=(False,),
        in_channels=16,
        out_channels=16,
    )
    return {
        "prior": prior,
        "text_encoder": tiny.clip(True),
        "tokenizer": new_tokenizer(causal=True),
        "scheduler": _scheduler("DDPMWuerstchenScheduler"),
        "image_encoder": tiny.clip_vision(),
        "feature_extractor": tiny.clip_processor(),
    }


def _combined(_: dict[str, Any]) -> dict[str, Any]:
    """What a prior's parts are called in a pipeline that has it built in."""
    return {f"prior_{part}": module for part, module in _prior().items()}


def _combined_inpaint(parts: dict[str, Any]) -> dict[str, Any]:
    return {**_combined(parts), "unet": _k22(9, "image")}


_TWO = {**SIZE, "prior_num_inference_steps": 2}
_IMAGE = {"image": PICTURE, "strength": 0.8}
_MASKED = {"image": PICTURE, "mask_image": MASK}


def _shap_e(**more: Any) -> dict[str, Any]:
    from diffusers import PriorTransformer
    from diffusers.pipelines.shap_e import ShapERenderer

    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        embedding_dim=16,
        num_embeddings=32,
        embedding_proj_dim=WIDTH,
        time_embed_dim=64,
        num_layers=1,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        **more,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    )
    return {
        "prior": prior,
        "shap_e_renderer": renderer,
        "text_encoder": tiny.clip(True),
        "tokenizer": new_tokenizer(causal=True),
        "image_encoder": tiny.clip_vision(False),
        "image_processor": tiny.clip_processor(),
        "scheduler": _scheduler(
            "HeunDiscreteScheduler",
            beta_schedule="exp",
            num_train_timesteps=1024,
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
        ),
    }


PIPELINES: dict[str, Entry] = {
    **UNCONDITIONAL,
    **entries(_dit, {"DiTPipeline": (same, {})}),
    **entries(_latent, {"LDMTextToImagePipeline": (same, {"height": 64, "width": 64})}),
    **entries(_kandinsky22, _KANDINSKY22),  # type: ignore[arg-type]
    **entries(
        _prior,
        {
            "KandinskyPriorPipeline": (same, {}),
            "KandinskyV22PriorPipeline": (same, {}),
            "KandinskyV22PriorEmb2EmbPipeline": (same, {"image": PICTURE, "strength": 0.8}),
        },
    ),
    **entries(
        _kandinsky21,
        {
            "KandinskyPipeline": (same, _GIVEN),
            "KandinskyImg2ImgPipeline": (same, {**_GIVEN, "image": PICTURE, "strength": 0.8}),
        },
    ),
    **entries(
        _kandinsky22,
        {
            "KandinskyV22CombinedPipeline": (_combined, _TWO),
            "KandinskyV22Img2ImgCombinedPipeline": (_combined, {**_TWO, **_IMAGE}),
            "KandinskyV22InpaintCombinedPipeline": (_combined_inpaint, {**_TWO, **_MASKED}),
        },
    ),
    **entries(
        _kandinsky21,
        {
            "KandinskyInpaintPipeline": (
                lambda _: {"unet": _k21(9)},
                {**_GIVEN, **_MASKED},
            ),
            "KandinskyCombinedPipeline": (_combined, _TWO),
            "KandinskyImg2ImgCombinedPipeline": (_combined, {**_TWO, **_IMAGE}),
            "KandinskyInpaintCombinedPipeline": (
                lambda parts: {**_combined(parts), "unet": _k21(9)},
                {**_TWO, **_MASKED},
            ),
        },
    ),
    **entries(
        _shap_e,
        {
            "ShapEPipeline": (same, {"frame_size": 16}),
            "ShapEImg2ImgPipeline": (
                lambda _: _shap_e(embedding_proj_norm_type="layer"),
                {"image": PICTURE, "frame_size": 16, **ONE},
            ),
        },
    ),
    **entries(
        _kandinsky3,
        {
            "Kandinsky3Pipeline": (same, SIZE),
            "Kandinsky3Img2ImgPipeline": (same, {"image": PICTURE, "strength": 0.8}),
        },
    ),
    **entries(
        _cascade,
        {
            "StableCascadePriorPipeline": (same, {"height": 128, "width": 128}),
        },
    ),
}
