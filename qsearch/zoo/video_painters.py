"""The video denoiser's training: a UMT5 encoder reads captions first, then flow matching on clips.

The denoiser (WanTransformer3DModel) is trained on single latent frames first, then on whole clips
and single frames in turn: of the 512 tokens of a clip every frame has 64, so the same time shows
eight times as many captions, and shapes and places are learnt from those.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moving_scenes import OBJECT_ATTRIBUTES, Clips, covered, describe, vocabulary
from .painters import TEXT_WIDTH, Export, Loss, Painter, keep_records, new_tokenizer
from .scenes import BACKGROUNDS, Caption
from .video_reader import new_video_text_encoder
from .video_vae import CHANNELS, LATENT_FRAMES, cached_clips

WIDTH = 160
#: WanPipeline's own default length of a prompt; what is beyond the words is zeros, and attended to
#: like words
LONGEST_PROMPT = 512
#: training clips whose latents are kept; single frames are drawn from fewer of them, eight each
CLIPS, CLIPS_FOR_FRAMES = 4096, 1024
#: share of the steps on clips that show single frames, and how many for each clip of a batch
FRAMES_SHARE, FRAMES_FOR_A_CLIP = 0.5, 4
SEEN_WEIGHT = 0.15
OBJECT_WEIGHT = 5.0
#: what a place of a latent frame shows, each with one class more for "no object here"; the
#: background everywhere
_SEEN = {k: v + 1 for k, v in OBJECT_ATTRIBUTES.items() if k != "event"} | {
    "background": len(BACKGROUNDS)
}


def new_video_denoiser() -> Any:
    """WanTransformer3DModel of eight blocks of width 160, full attention over space and time."""
    from diffusers import WanTransformer3DModel

    denoiser = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=5,
        attention_head_dim=WIDTH // 5,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * WIDTH,
        num_layers=8,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(denoiser.proj_out.weight)
    with torch.no_grad():
        for block in denoiser.blocks:
            nn.init.zeros_(block.attn2.to_out[0].weight)
            block.scale_shift_table[:, 2::3] = 0.3  # the gates: near zero, branches learn slowly
    return denoiser


class VideoPainter(Painter):
    """Text encoder, video denoiser, and `Painter`'s head, which here also says how things move."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.text_encoder = new_video_text_encoder().requires_grad_(False)
        self.denoiser: Any = new_video_denoiser()
        self.middle = "blocks.4"
        self.head = nn.Linear(WIDTH, sum(_SEEN.values()))

    def paint_clips(
        self, noisy: Tensor, sigma: Tensor, words: Tensor, mask: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The velocity [N, 8, F, 16, 16], and the head's logits [N, F * 64, classes].

        The pipeline pads a prompt with zeros to any length, and the zeros are attended to: all
        alike, they count as one token that weighs as many. So `words` [N, T] end with at least one
        pad, and `lengths` [N] says how long the prompt would be, pads included.
        """
        with torch.no_grad():
            text = self.text_encoder(words, attention_mask=mask)[0] * mask[..., None]
        used = mask.sum(1)
        weigh = ((lengths - used) / (words.shape[1] - used)).log()
        bias = torch.where(mask.bool(), 0.0, weigh[:, None])[:, None]
        for block in self.denoiser.blocks:
            block.attn2.processor.bias = bias
        features: list[Tensor] = []
        middle = self.denoiser.get_submodule(self.middle)
        handle = middle.register_forward_hook(
            lambda _module, _inputs, output: features.append(output)
        )
        velocity = self.denoiser(noisy, sigma * 1000, text, return_dict=False)[0]
        handle.remove()
        return velocity, dict(
            zip(_SEEN, self.head(features[0]).split(list(_SEEN.values()), -1), strict=True)
        )


def train_attention(denoiser: Any) -> None:
    """Give every attention a processor for training: plain products, a bias on the text's tokens.

    On a CPU the fused attention's backward pass in bfloat16 takes twice as long as three plain
    products. The bias, set in `paint_clips`, is why the pipeline's own processor does not do.
    """
    for block in denoiser.blocks:
        block.attn1.set_processor(PlainAttention())
        block.attn2.set_processor(PlainAttention())


class PlainAttention:
    """WanTransformer3DModel's attention, written out; `bias` [N, 1, T] is added to the scores."""

    bias: Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend to the text where it is given, to all tokens otherwise: [N, S, width]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        exact = attn.norm_q.weight.dtype
        query, key = (
            attn.norm_q(attn.to_q(hidden_states).to(exact)),
            attn.norm_k(attn.to_k(source).to(exact)),
        )
        value = attn.to_v(source)

        def split(x: Tensor, turn: bool) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1))
            if turn and rotary_emb is not None:
                (real, imaginary), cos, sin = (
                    x.unflatten(-1, (-1, 2)).unbind(-1),
                    *(r[..., 0::2] for r in rotary_emb),
                )
                x = torch.stack(
                    [real * cos - imaginary * sin, real * sin + imaginary * cos], -1
                ).flatten(-2)
            return x.to(value.dtype).transpose(1, 2).flatten(0, 1)

        q, k, v = split(query, True), split(key, True), split(value, False)
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.mT)
        if self.bias is not None:
            scores = scores + self.bias.repeat_interleave(attn.heads, 0).to(scores.dtype)
        mixed = (
            torch.bmm(scores.softmax(-1).to(v.dtype), v)
            .unflatten(0, (-1, attn.heads))
            .transpose(1, 2)
            .flatten(2)
        )
        out: Tensor = attn.to_out[0](mixed)
        return out


def visible_motion(clips: Clips, index: Tensor) -> dict[str, Tensor]:
    """What each 8x8 pixels of the frames `index` [N, K] show: classes [N, K * 64] by attribute."""
    cells = covered(clips, index, 8).flatten(1)
    out = {"background": clips.background[:, None].expand(-1, cells.shape[1])}
    for k, classes in _SEEN.items():
        if k != "background":
            value = getattr(clips, k).gather(1, cells.clamp(min=0))
            out[k] = torch.where((cells < 0) | (value < 0), classes - 1, value)
    return out


def object_weights(clips: Clips, latent_frames: Tensor) -> Tensor:
    """Loss weights [N, 1, K, 16, 16] of mean 1: five times as much where an object is."""
    late, early = 2 * latent_frames, (2 * latent_frames - 1).clamp(min=0)
    there = (covered(clips, late, 4) >= 0) | (covered(clips, early, 4) >= 0)
    weights = (1 + (OBJECT_WEIGHT - 1) * there.float())[:, None]
    return weights / weights.mean()


def new_video_scheduler() -> Any:
    """UniPC on the flow-matching noise levels, as Wan's own pipelines come with."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )


def make_video_painter(
    whole: bool, runs: Path, device: torch.device, batch: int
) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of the denoiser, on single latent frames or (`whole`) on clips and
    frames.

    Needs the trained VAE and text encoder in `runs`; clips also start from what single frames
    taught, where that is there.
    """
    painter = VideoPainter()
    train_attention(painter.denoiser)
    tokenizer = new_tokenizer(False, vocabulary())
    latents, clips = cached_clips(runs, CLIPS if whole else CLIPS_FOR_FRAMES, device=device)
    painter.text_encoder.load_state_dict(
        torch.load(runs / "scenes-video-text" / "text_encoder.pt", weights_only=True)
    )
    frames = runs / "scenes-video-frames" / "painter.pt"
    if whole and frames.exists():
        painter.load_state_dict(torch.load(frames, weights_only=True))

    def loss(generator: torch.Generator) -> Tensor:
        single = not whole or bool(torch.rand((), generator=generator) < FRAMES_SHARE)
        shown = batch * FRAMES_FOR_A_CLIP if whole and single else batch
        index = torch.randint(len(clips), (shown,), generator=generator)
        some = clips[index]
        captions: list[Caption] = describe(some, generator)
        drop = (torch.rand(shown, generator=generator) < 0.1).tolist()
        texts = ["" if d else c.text for c, d in zip(captions, drop, strict=True)]
        longest = max(len(t) for t in tokenizer(texts).input_ids)
        tokens = tokenizer(
            texts, padding="max_length", max_length=longest + 1, return_tensors="pt"
        ).to(device)
        lengths = (longest + 1) * (LONGEST_PROMPT / (longest + 1)) ** torch.rand(
            shown, generator=generator
        )
        # Half of the batch is nearly noise alone: there the words decide what goes where, and
        # reading them is learnt last.
        sigma = torch.sigmoid(torch.randn(shown, generator=generator) * 1.1 + 0.3)
        sigma[::2] = 0.7 + 0.3 * torch.rand(len(sigma[::2]), generator=generator)
        sigma = sigma.to(device)
        if single:
            which = torch.randint(LATENT_FRAMES, (shown, 1), generator=generator)
            clean = latents[index, :, which[:, 0]].float()[:, :, None].to(device)
        else:
            which = torch.arange(LATENT_FRAMES).expand(shown, -1)
            clean = latents[index].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        mix = sigma.view(-1, 1, 1, 1, 1)
        velocity, logits = painter.paint_clips(
            (1 - mix) * clean + mix * noise,
            sigma,
            tokens.input_ids,
            tokens.attention_mask,
            lengths.to(device),
        )
        weight = object_weights(some, which).to(device)
        error: Tensor = weight * (velocity.float() - (noise - clean)).square()
        place = F.max_pool3d(weight, (1, 2, 2)).flatten(1)
        truth = visible_motion(some, 2 * which)
        wrong = [
            (place * F.cross_entropy(logits[k].float().mT, v.to(device), reduction="none")).mean()
            for k, v in truth.items()
        ]
        return error.mean() + SEEN_WEIGHT * torch.stack(wrong).sum()

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        torch.save(average.state_dict(), folder / "painter.pt")
        if whole:
            write_video_pipeline(average, runs, out / "scenes_video", folder)

    return painter, loss, export


def _vae(runs: Path) -> Any:
    """The trained VAE, without the path that it was read from, which its file would name."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(runs / "video-vae" / "vae")
    vae.register_to_config(_name_or_path="")
    return vae


def begin_from(runs: Path, folder: Path) -> None:
    """Put the VAE and the text encoder of a saved pipeline where a training looks for them, where
    `runs` has none: clips go on from shipped weights (`--warm`) without training both anew.
    """
    from safetensors.torch import load_file

    vae, text = runs / "video-vae" / "vae", runs / "scenes-video-text" / "text_encoder.pt"
    if not vae.exists():
        shutil.copytree(folder / "vae", vae)
    if not text.exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        encoder = new_video_text_encoder()
        held = load_file(folder / "text_encoder" / "model.safetensors")
        encoder.load_state_dict(held, strict=False)
        torch.save(encoder.state_dict(), text)


def write_video_pipeline(average: Any, runs: Path, target: Path, folder: Path) -> None:
    """Save a WanPipeline of the averaged painter, VAE and text encoder, and their records."""
    from diffusers import WanPipeline

    average = average.cpu()
    denoiser = new_video_denoiser()  # with the ordinary processors
    denoiser.load_state_dict(average.denoiser.state_dict())
    # The text encoder stays in fp32: transformers loads it in the file's type, the denoiser in
    # fp32, and they must agree.
    pipe = WanPipeline(
        tokenizer=new_tokenizer(False, vocabulary()),
        text_encoder=average.text_encoder.float(),
        transformer=denoiser.half(),
        vae=_vae(runs).half(),
        scheduler=new_video_scheduler(),
    )
    pipe.save_pretrained(target)
    for source, place in (
        (folder, target),
        (runs / "scenes-video-frames", target / "transformer"),
        (runs / "video-vae", target / "vae"),
        (runs / "scenes-video-text", target / "text_encoder"),
    ):
        if (source / "loss.csv").exists():  # begun from shipped weights, it was not trained here
            keep_records(source, place)
    # A training that may go on is exported on its way: the record says how far it had come.
    record = json.loads((target / "recipe.json").read_text(encoding="utf-8"))
    last = (folder / "loss.csv").read_text(encoding="utf-8").splitlines()[-1]
    record |= {
        "step": int(last.split(",")[0]),
        "begun from": "single frames: transformer/recipe.json",
    }
    (target / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {target}", flush=True)
