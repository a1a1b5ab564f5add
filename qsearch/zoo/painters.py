"""The denoisers' side of the recipes: text encoders that read captions first, then flow matching on
cached latents.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Caption,
    Scenes,
    describe,
    draw_scenes,
    places,
    render,
    vocabulary,
)

Loss = Callable[[torch.Generator], Tensor]
Export = Callable[[nn.Module, Path, Path], None]

PAD, END, BEGIN, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"
MAX_WORDS = 36
TEXT_WIDTH = 128
UNET_WIDTHS = (64, 128)
SEEN_WEIGHT = 0.15  # of the head's cross-entropy beside the velocity's squared error


#: what a place of the picture shows, each with one class more for "no object here"; the scene's
#: background everywhere
_SEEN = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "texture": len(TEXTURES) + 1,
    "background": len(BACKGROUNDS),
}


class Painter(nn.Module):
    """A text encoder, as it is, and a denoiser trained by flow matching: x_s = (1 - s) x + s noise,
    target noise - x.

    In training a linear head on the features [N, 64, width] of the denoiser's middle (the submodule
    named `middle`) also says what each place will show. Features that know the scene come first and
    the picture follows (REPA, arXiv:2410.06940, with the scene's own labels in place of another
    network's features); the head is not shipped.
    """

    def __init__(
        self, text_encoder: nn.Module, denoiser: nn.Module, middle: str, width: int
    ) -> None:
        super().__init__()
        # Trained on, at a denoiser's learning rate, it loses what it learnt: left of and right of
        # were the first to go.
        self.text_encoder = text_encoder.requires_grad_(False)
        self.denoiser, self.middle = denoiser, middle
        self.head = nn.Linear(width, sum(_SEEN.values()))

    def paint(
        self, noisy: Tensor, sigma: Tensor, words: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The velocity, as `forward` gives it, and the head's logits [N, 64, classes] by
        attribute.
        """
        features: list[Tensor] = []
        handle = self.denoiser.get_submodule(self.middle).register_forward_hook(
            lambda _module, _inputs, output: features.append(output)
        )
        velocity = self(noisy, sigma, words, mask)
        handle.remove()
        tokens = features[0].flatten(2).mT if features[0].ndim == 4 else features[0]
        return velocity, dict(
            zip(_SEEN, self.head(tokens).split(list(_SEEN.values()), -1), strict=True)
        )

    def forward(self, noisy: Tensor, sigma: Tensor, words: Tensor, mask: Tensor | None) -> Tensor:
        """Velocity [N, 4, 16, 16] at noise levels `sigma` [N] for token ids `words` [N, T] and an
        optional mask [N, T].
        """
        text = self.text_encoder(words, attention_mask=mask)[0]
        if mask is None:
            velocity: Tensor = self.denoiser(noisy, sigma * 1000, text, return_dict=False)[0]
        else:
            extra = {"resolution": None, "aspect_ratio": None}
            velocity = self.denoiser(
                noisy,
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                timestep=sigma * 1000,
                added_cond_kwargs=extra,
                return_dict=False,
            )[0]
        return velocity


def keep_records(run: Path, target: Path) -> None:
    """Copy a training's recipe.json and loss.csv to where its weights go."""
    for name in ("recipe.json", "loss.csv"):
        shutil.copy(run / name, target / name)


def warm_start(painter: Painter, folder: Path) -> None:
    """Load the weights of a saved pipeline (its text encoder, and its unet or transformer), to
    train on from them.
    """
    from safetensors.torch import load_file

    denoiser = next(folder / name for name in ("unet", "transformer") if (folder / name).is_dir())
    painter.denoiser.load_state_dict(
        {
            k: v.float()
            for k, v in load_file(denoiser / "diffusion_pytorch_model.safetensors").items()
        }
    )
    missing, unknown = painter.text_encoder.load_state_dict(
        load_file(folder / "text_encoder" / "model.safetensors"), strict=False
    )
    # T5 keeps its embedding under two names and saves it under one; the two are one tensor.
    if unknown or set(missing) - {"encoder.embed_tokens.weight"}:
        raise ValueError(f"{folder} is another architecture: missing {missing}, unknown {unknown}")


def new_tokenizer(causal: bool, vocabulary: tuple[str, ...] = vocabulary()) -> Any:
    """Word-level tokenizer over the captions' vocabulary; the causal encoder's sentences also begin
    with a token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, BEGIN, UNKNOWN, *vocabulary]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = f"{BEGIN} $A {END}" if causal else f"$A {END}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(BEGIN, 2), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=BEGIN,
        unk_token=UNKNOWN,
        model_max_length=MAX_WORDS,
    )


def new_unet() -> Painter:
    """UNet2DConditionModel with ResNet, self- and cross-attention blocks, and a causal
    CLIPTextModel.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary()) + 4,
            hidden_size=TEXT_WIDTH,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_WORDS,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=UNET_WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return Painter(text, unet, "mid_block", UNET_WIDTHS[-1])


def new_dit() -> Painter:
    """PixArtTransformer2DModel with eight blocks over 64 image tokens, and a small T5 encoder."""
    from diffusers import PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    text = T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary()) + 4,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    dit = PixArtTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        cross_attention_dim=160,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=16,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    nn.init.zeros_(dit.proj_out.weight)
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.attn1.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].weight)
    return Painter(text, dit, "transformer_blocks.4", 160)


def new_scheduler() -> Any:
    """DPM-Solver++ on the flow-matching noise levels; both pipelines accept it."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, steps_offset=1
    )


def cached_latents(runs: Path, device: torch.device, count: int = 49_152) -> tuple[Tensor, Scenes]:
    """Latents [count, 4, 16, 16] (already scaled) of training scenes and the scenes; encoded once
    and kept beside the VAE.
    """
    from diffusers import AutoencoderKL

    scenes = draw_scenes(count, torch.Generator().manual_seed(20), held_out=False)
    path = runs / "vae" / f"latents-{count}.pt"
    if path.exists():
        return torch.load(path, weights_only=True).to(device), scenes
    vae = AutoencoderKL.from_pretrained(runs / "vae" / "vae").to(device)
    parts = []
    with torch.no_grad():
        for i in range(0, count, 256):
            mean = vae.encode(render(scenes[i : i + 256]).to(device)).latent_dist.mean
            parts.append(mean.cpu() * vae.config.scaling_factor)
    torch.save(torch.cat(parts), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return torch.cat(parts).to(device), scenes


def cached_weights(runs: Path, scenes: Scenes, objects: float = 5.0) -> Tensor:
    """Loss weights [N, 1, 16, 16] of mean 1: where an object is, `objects` times that of the
    background; kept beside the latents.

    Four fifths of a picture are background and soon learnt. Weighting places leaves the minimiser
    of the squared error where it is.
    """
    path = runs / "vae" / f"weights-{len(scenes)}.pt"
    if not path.exists():
        parts = []
        for i in range(0, len(scenes), 256):
            part = scenes[i : i + 256]
            empty = replace(part, shape=torch.full_like(part.shape, -1))
            parts.append(
                F.max_pool2d((render(part) - render(empty)).abs().amax(1, keepdim=True), 4) > 0.05
            )
        torch.save(torch.cat(parts), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    weights: Tensor = 1 + (objects - 1) * torch.load(path, weights_only=True).float()
    return weights / weights.mean()


def visible(scenes: Scenes, weights: Tensor) -> dict[str, Tensor]:
    """What each of the 64 places (8x8 pixels, row by row) shows: class indices [N, 64] by
    attribute; no object is the last class.

    A place belongs to the object with the nearest centre if `weights` [N, 1, 16, 16] say that there
    is one.
    """
    axis = torch.arange(8, device=weights.device) * 8.0 + 4
    cells = torch.stack([axis.repeat(8), axis.repeat_interleave(8)], -1)
    nearest = torch.cdist(places(scenes), cells).argmin(1)
    there = F.max_pool2d(weights, 2).flatten(1) > weights.amin()
    out = {
        k: torch.where(there, getattr(scenes, k).gather(1, nearest), n - 1)
        for k, n in _SEEN.items()
        if k != "background"
    }
    return out | {"background": scenes.background[:, None].expand(-1, 64)}


def make_painter(
    kind: str, runs: Path, device: torch.device, batch: int
) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of a pipeline (scenes-unet or scenes-dit); needs the trained VAE and
    text encoder in `runs`.
    """
    causal = kind == "scenes-unet"
    painter = new_unet() if causal else new_dit()
    tokenizer = new_tokenizer(causal)
    latents, scenes = cached_latents(runs, device)
    weights = cached_weights(runs, scenes).to(device)
    painter.text_encoder.load_state_dict(
        torch.load(runs / f"{kind}-text" / "text_encoder.pt", weights_only=True)
    )

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (batch,), generator=generator)
        captions: list[Caption] = describe(scenes[index], generator)
        drop = (torch.rand(batch, generator=generator) < 0.1).tolist()
        texts = ["" if d else c.text for c, d in zip(captions, drop, strict=True)]
        tokens = tokenizer(
            texts,
            padding="max_length" if causal else "longest",
            max_length=MAX_WORDS,
            return_tensors="pt",
        ).to(device)
        # Half of the batch is nearly noise alone: there the words decide what goes where, and
        # reading them is learnt last.
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.1 + 0.3)
        sigma[::2] = 0.7 + 0.3 * torch.rand(len(sigma[::2]), generator=generator)
        sigma = sigma.to(device)
        clean = latents[index.to(device)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        mix = sigma.view(-1, 1, 1, 1)
        velocity, logits = painter.paint(
            (1 - mix) * clean + mix * noise,
            sigma,
            tokens.input_ids,
            None if causal else tokens.attention_mask,
        )
        weight = weights[index.to(device)]
        error: Tensor = weight * (velocity.float() - (noise - clean)).square()
        truth = visible(scenes[index], weight.cpu())
        place = F.max_pool2d(weight, 2).flatten(1)
        wrong = [
            (place * F.cross_entropy(logits[k].float().mT, v.to(device), reduction="none")).mean()
            for k, v in truth.items()
        ]
        return error.mean() + SEEN_WEIGHT * torch.stack(wrong).sum()

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        from diffusers import AutoencoderKL, PixArtAlphaPipeline, StableDiffusionPipeline

        target = out / kind.replace("-", "_")
        vae = AutoencoderKL.from_pretrained(runs / "vae" / "vae").half()
        average = average.cpu()
        parts: dict[str, Any] = {"tokenizer": tokenizer, "vae": vae, "scheduler": new_scheduler()}
        # The text encoder stays in fp32: transformers loads it in the file's type, the denoiser in
        # fp32, and they must agree.
        parts["text_encoder"] = average.text_encoder.float()
        if causal:
            parts |= {
                "unet": average.denoiser.half(),
                "safety_checker": None,
                "feature_extractor": None,
            }
            pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        else:
            pipe = PixArtAlphaPipeline(**parts, transformer=average.denoiser.half())
        pipe.save_pretrained(target)
        for source, place in (
            (folder, target),
            (runs / "vae", target / "vae"),
            (runs / f"{kind}-text", target / "text_encoder"),
        ):
            keep_records(source, place)
        print(f"wrote {target}")

    return painter, loss, export
