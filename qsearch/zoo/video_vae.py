"""The video VAE: a small AutoencoderKLWan, its training, and the latents of the training clips.

64x64 pixels become 16x16 latents; in time the first frame has a latent of its own and every later
two frames share one (15 frames: 8 latents). The clips are split into patches of 2x2 pixels first,
as in Wan 2.2's VAE.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moving_scenes import FRAMES, Clips, covered, draw_clips, render
from .painters import Export, Loss

CHANNELS = 8
LATENT_FRAMES = 8
#: AutoencoderKLWan encodes the first frame and then groups of four; frames beyond `FRAMES` never
#: reach the first latents
ENCODED_FRAMES = 17
OBJECT_WEIGHT = 5.0
SHARD = 512


def new_video_vae() -> Any:
    """AutoencoderKLWan: clips [N, 3, 15, 64, 64] to latents [N, 8, 8, 16, 16]."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 3],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    with torch.no_grad():
        _begin_with_averages(vae)
    return vae


def _begin_with_averages(vae: Any) -> None:
    """Set weights so that training begins from block colours: they take long to learn.

    Residual branches begin at zero. What remains passes on the mean colour of 4x4 pixels, its
    gradients, and how the colour differs between the two frames of a latent. Where a norm and a
    SiLU stand in between, a channel goes through as a pair of both signs, since silu(x) - silu(-x)
    = x, beside constant channels that hold the norm. Random weights stay, at a tenth.
    """
    encoder, decoder = vae.encoder, vae.decoder
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "proj.weight", "proj.bias")):
            parameter.zero_()
        elif not any(part in name for part in ("conv1", "to_qkv", "gamma")):
            parameter *= 0.1
    centre, last = (2, 1, 1), (2, 0, 0)  # of a causal kernel, the taps on the frame itself
    for i in range(12):
        encoder.conv_in.weight[(i, i, *centre)] += 1
    down = encoder.down_blocks[1]
    for colour in range(3):
        for r, s, pw, ph in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
            source = (4 * colour + 2 * pw + ph, r, s)
            for row, sign in (
                (colour, 1),
                (3 + colour, 2 * s - 1),
                (6 + colour, 2 * r - 1),
                (9 + colour, 1),
            ):
                down.resample[1].weight[(row, *source)] += sign / 16
    for i in range(12):
        down.time_conv.weight[i, i, 1] += 0.5 if i < 9 else -0.5
        down.time_conv.weight[i, i, 2] += 0.5
    shortcut = encoder.down_blocks[2].conv_shortcut
    for i in range(16):
        shortcut.weight[i, i] += 1
        shortcut.weight[16 + i, i] -= 1
    shortcut.bias[32:] = 2.0
    norm = math.sqrt(48 / (16 * 2.0**2))
    gains = [(c, c, 1.5) for c in range(3)] + [(5 + c, 9 + c, 4.0) for c in range(3)]
    gains += [(3, 3 + c, 2.0) for c in range(3)] + [(4, 6 + c, 2.0) for c in range(3)]
    for latent, channel, gain in gains:
        encoder.conv_out.weight[(latent, channel, *centre)] += gain / norm
        encoder.conv_out.weight[(latent, 16 + channel, *centre)] -= gain / norm
    for i in range(CHANNELS):
        vae.quant_conv.weight[i, i] += 1
        vae.post_quant_conv.weight[i, i] += 1
        decoder.conv_in.weight[(i, i, *centre)] += 1
    vae.quant_conv.bias[
        CHANNELS:
    ] = -5.0  # a posterior as wide as the prior would hide the clip from the decoder
    up = decoder.up_blocks[0].upsamplers[0]
    for half, sign in ((0, -1), (48, 1)):
        for i in range(48):
            up.time_conv.weight[(half + i, i, *last)] += 1
        for c in range(3):
            up.time_conv.weight[(half + c, 5 + c, *last)] += sign * 1.5 / 4
    for i in range(8):
        up.resample[1].weight[i, i, 1, 1] += 1
    shortcut = decoder.up_blocks[1].resnets[0].conv_shortcut
    shortcut.bias[12:] = 3.0
    norm = math.sqrt(16 / (4 * 3.0**2))
    for c in range(3):
        shortcut.weight[c, c] += 1 / 1.5
        shortcut.weight[3 + c, c] -= 1 / 1.5
        for i in range(4):
            decoder.conv_out.weight[(4 * c + i, c, *centre)] += 1 / norm
            decoder.conv_out.weight[(4 * c + i, 3 + c, *centre)] -= 1 / norm


def make_video_vae(runs: Path, device: torch.device, batch: int) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of the VAE; a step has `batch` clips of 5 frames, or half of 9."""
    vae = new_video_vae()

    def loss(generator: torch.Generator) -> Tensor:
        long = bool(torch.rand(1, generator=generator) < 0.4)
        clips = draw_clips(max(1, batch // 2) if long else batch, generator)
        count = 9 if long else 5
        start = torch.randint(ENCODED_FRAMES - count + 1, (len(clips), 1), generator=generator)
        index = start + torch.arange(count)
        x = render(clips, index).to(device)
        weight = 1 + (OBJECT_WEIGHT - 1) * (covered(clips, index, 1) >= 0).float()[:, None].to(
            device
        )
        weight = weight / weight.mean()
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        wrong = (weight * ((y - x).abs() + (y - x).square())).mean()
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(
            y.diff(dim=-2), x.diff(dim=-2)
        )
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total: Tensor = wrong + edges + 3e-4 * divergence
        return total

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        average.eval()
        clips = draw_clips(64, torch.Generator().manual_seed(9))
        index = torch.arange(ENCODED_FRAMES).expand(len(clips), -1)
        x = render(clips, index).to(device)
        with torch.no_grad():
            posterior = average.encode(x).latent_dist  # type: ignore[operator]
            latents = posterior.mean[:, :, :LATENT_FRAMES]
            back = average.decode(latents).sample  # type: ignore[operator]
        mean, std = latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()
        rounded = {
            "latents_mean": [round(m, 4) for m in mean],
            "latents_std": [round(s, 4) for s in std],
        }
        average.register_to_config(**rounded)  # type: ignore[operator]
        average.save_pretrained(folder / "vae")  # type: ignore[operator]
        error = (x[:, :, :FRAMES] - back).abs()
        there = (covered(clips, index[:, :FRAMES], 1) >= 0)[:, None].expand_as(error).to(device)
        scores = {
            "L1": float(error.mean()),
            "L1 on objects": float(error[there].mean()),
            "clips": len(clips),
        }
        (folder / "vae" / "scores.json").write_text(
            json.dumps(scores, indent=2) + "\n", encoding="utf-8"
        )
        print(f"video-vae: {scores} on [-1, 1], {rounded}", flush=True)

    return vae, loss, export


def encode(vae: Any, clips: Clips) -> Tensor:
    """Latents [N, 8, 8, 16, 16] of rendered clips, of mean 0 and deviation 1 a channel."""
    with torch.no_grad():
        mean = vae.encode(render(clips, ENCODED_FRAMES).to(vae.device, vae.dtype)).latent_dist.mean[
            :, :, :LATENT_FRAMES
        ]
    shift, scale = (
        torch.tensor(v, device=mean.device).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    normal: Tensor = (mean.float() - shift) / scale
    return normal.cpu()


def cached_clips(
    runs: Path, count: int, device: torch.device | None = None
) -> tuple[Tensor, Clips]:
    """Latents [count, 8, 8, 16, 16] (fp16) of training clips and the clips, encoded once.

    A shard depends on the VAE and its own seed alone: any process may make it, and fewer clips are
    the first of more.
    """
    from diffusers import AutoencoderKLWan

    weights = runs / "video-vae" / "vae" / "diffusion_pytorch_model.safetensors"
    key = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    folder = runs / "video-vae" / f"latents-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    vae, latents, drawn = None, [], []
    for shard in range(math.ceil(count / SHARD)):
        clips = draw_clips(SHARD, torch.Generator().manual_seed(2000 + shard), held_out=False)
        path = folder / f"{shard:04d}.pt"
        if not path.exists():
            if vae is None:
                vae = (
                    AutoencoderKLWan.from_pretrained(runs / "video-vae" / "vae")
                    .to(device or "cpu")
                    .eval()
                )
            parts = [encode(vae, clips[i : i + 16]) for i in range(0, SHARD, 16)]
            torch.save(torch.cat(parts).half(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            print(f"encoded {(shard + 1) * SHARD} clips", flush=True)
        latents.append(torch.load(path, weights_only=True))
        drawn.append(clips)
    whole = Clips(**{f.name: torch.cat([getattr(c, f.name) for c in drawn]) for f in fields(Clips)})
    return torch.cat(latents)[:count], whole[:count]
