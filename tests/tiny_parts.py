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


def vae_flux2() -> Any:
    """AutoencoderKLFlux2: latents in patches, normalized by a batch norm."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=16,
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


def siglip(width: int = WIDTH) -> Any:
    """SigLIP's image model."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=PICTURE // 4,
    )
    return SiglipVisionModel(config)


def siglip2(width: int = WIDTH) -> Any:
    """SigLIP 2's image model, of patches in any number."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=16,
        patch_size=4,
    )
    return Siglip2VisionModel(config)


def t5(width: int = WIDTH, words: int = 0) -> Any:
    """T5's encoder; of the zoo's words, or of another number of them."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=words or len(new_tokenizer(causal=False)), **sizes))


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


#: what stands for pictures and turns in Qwen's templates
_TURNS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
IMAGE_WORD, VIDEO_WORD = "<|image_pad|>", "<|video_pad|>"


def vision_tokenizer(letters: bool = False) -> Any:
    """A tokenizer with a template for messages whose contents may be lists, and Qwen's words for
    pictures; of long texts.

    Args:
        letters: a token a letter, for pipelines that drop a template of more tokens than it has
            words.
    """
    from tokenizers import Regex, pre_tokenizers

    tokenizer = new_tokenizer(causal=True)
    if letters:
        each = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.backend_tokenizer.pre_tokenizer = each
    tokenizer.add_tokens([*_TURNS, IMAGE_WORD, VIDEO_WORD], special_tokens=True)
    tokenizer.model_max_length = 4096
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %} {% endfor %}"
    )
    return tokenizer


def gemma3(**more: Any) -> Any:
    """Gemma 3 with its image model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    words = len(new_tokenizer(causal=True))
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": words,
        **_SPECIAL,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": PICTURE,
        "patch_size": PICTURE // 4,
    }
    config = Gemma3Config(
        text_config=text | more, vision_config=vision, image_token_index=3, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config)


def mistral3(whole: bool = True) -> Any:
    """Mistral 3 with its image model; with its output layer, or without."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Mistral3Model

    text = {
        "model_type": "mistral",
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(vision_tokenizer()),
        **_SPECIAL,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": PICTURE,
        "patch_size": PICTURE // 4,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    return (Mistral3ForConditionalGeneration if whole else Mistral3Model)(config)


def llava() -> Any:
    """LLaVA: CLIP's image model before a Llama."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(new_tokenizer(causal=True)),
        **_SPECIAL,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
        "image_size": PICTURE,
        "patch_size": PICTURE // 4,
    }
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=3, pad_token_id=0
    )
    return LlavaForConditionalGeneration(config)


def t5gemma() -> Any:
    """T5Gemma's encoder."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    module = T5GemmaModuleConfig(
        vocab_size=len(new_tokenizer(causal=True)),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=64,
        layer_types=["full_attention", "full_attention"],
    ).to_dict()
    config = T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return T5GemmaEncoderModel(config)


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
