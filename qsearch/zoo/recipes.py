"""What the zoo is made of: the VAE, the judge, both denoisers and their text encoders, each with
its length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .judge import Judge, labels
from .painters import Export, Loss, keep_records, make_painter
from .reader import make_reader
from .scenes import draw_scenes, render
from .video_judge import make_video_judge
from .video_painters import make_video_painter
from .video_reader import make_video_reader
from .video_vae import make_video_vae


@dataclass(frozen=True)
class Recipe:
    """`make(runs, device, batch)` gives the module to train, its loss, and what writes the finished
    weights; `bf16`: products in bfloat16 on any device.
    """

    make: Callable[[Path, torch.device, int], tuple[nn.Module, Loss, Export]]
    steps: int
    batch: int
    rate: float
    bf16: bool = False


def half(module: nn.Module) -> dict[str, Tensor]:
    """State dict in fp16, contiguous, on the CPU."""
    return {k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------- VAE


def new_vae() -> Any:
    """AutoencoderKL, 64x64 pixels to 16x16x4 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def _make_vae(runs: Path, device: torch.device, batch: int) -> tuple[nn.Module, Loss, Export]:
    vae = new_vae()

    def loss(generator: torch.Generator) -> Tensor:
        x = render(draw_scenes(batch, generator)).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(
            y.diff(dim=-2), x.diff(dim=-2)
        )
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        total: Tensor = F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges + 3e-4 * divergence
        return total

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        average.eval()
        with torch.no_grad():
            x = render(draw_scenes(512, torch.Generator().manual_seed(9))).to(device)
            latents = average.encode(x).latent_dist.sample()  # type: ignore[operator]
            back = average.decode(latents).sample  # type: ignore[operator]
        average.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))  # type: ignore[operator]
        average.save_pretrained(folder / "vae")  # type: ignore[operator]
        print(
            f"vae: L1 {float((x - back).abs().mean()):.4f} on [-1, 1], latent mean "
            f"{latents.mean((0, 2, 3)).tolist()} std {float(latents.std()):.3f}"
        )

    return vae, loss, export


# -------------------------------------------------------------------------------------------- judge


def _make_judge(runs: Path, device: torch.device, batch: int) -> tuple[nn.Module, Loss, Export]:
    judge = Judge()

    def loss(generator: torch.Generator) -> Tensor:
        scenes = draw_scenes(batch, generator)
        x = render(scenes)
        # A decoder blurs and a sampler leaves noise: the judge must read attributes, not the
        # renderer's exact pixels.
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        mix = torch.rand(batch, 1, 1, 1, generator=generator).clamp(max=0.7)
        noise = (
            torch.randn(x.shape, generator=generator)
            * 0.12
            * torch.rand(batch, 1, 1, 1, generator=generator)
        )
        logits = judge((x + mix * (blurred - x) + noise).to(device))
        parts = [
            F.cross_entropy(logits[k].flatten(0, -2), v.flatten().to(device))
            for k, v in labels(scenes).items()
        ]
        return torch.stack(parts).sum()

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        from safetensors.torch import save_file

        (out / "judge_weights").mkdir(parents=True, exist_ok=True)
        save_file(half(average), out / "judge_weights" / "judge.safetensors")
        keep_records(folder, out / "judge_weights")
        scenes = draw_scenes(4096, torch.Generator().manual_seed(10), held_out=True)
        with torch.no_grad():
            logits = average.eval()(render(scenes).to(device))
        scores = {
            k: float((logits[k].argmax(-1).cpu() == v).float().mean())
            for k, v in labels(scenes).items()
        }
        (out / "judge_weights" / "scores.json").write_text(
            json.dumps({"accuracy": scores, "scenes": len(scenes)}, indent=2) + "\n"
        )
        print(scores)

    return judge, loss, export


def _make_ecar(
    name: str, runs: Path, device: torch.device, batch: int
) -> tuple[nn.Module, Loss, Export]:
    # It imports diffusers' models, which the other recipes do without until they run.
    from .ecar.training import make

    return make(name, runs, device, batch)


def warm_ecar(module: nn.Module, folder: Path) -> None:
    """Start a multistage model's flow network from the transformer of a saved scenes-dit."""
    from .ecar.training import MultistagePainter, warm_start

    assert isinstance(module, MultistagePainter)
    warm_start(module, folder)


#: the multistage autoregressive model, and its rivals of one stage and of three whole denoisings
ECAR = ("scenes-ecar", "ecar-single", "ecar-full")

RECIPES = {
    "vae": Recipe(_make_vae, steps=1500, batch=16, rate=1.5e-3),
    "judge": Recipe(_make_judge, steps=1500, batch=64, rate=1e-3),
    "scenes-unet-text": Recipe(partial(make_reader, "scenes-unet"), steps=950, batch=96, rate=1e-3),
    "scenes-dit-text": Recipe(partial(make_reader, "scenes-dit"), steps=950, batch=96, rate=1e-3),
    "scenes-unet": Recipe(partial(make_painter, "scenes-unet"), steps=8000, batch=32, rate=1e-3),
    "scenes-dit": Recipe(partial(make_painter, "scenes-dit"), steps=12000, batch=32, rate=1.5e-3),
    "video-vae": Recipe(make_video_vae, steps=2000, batch=4, rate=7e-4, bf16=True),
    "video-judge": Recipe(make_video_judge, steps=3000, batch=16, rate=1.5e-3, bf16=True),
    "scenes-video-text": Recipe(make_video_reader, steps=1000, batch=96, rate=1e-3, bf16=True),
    "scenes-video-frames": Recipe(
        partial(make_video_painter, False), steps=3000, batch=32, rate=1.5e-3, bf16=True
    ),
    "scenes-video": Recipe(
        partial(make_video_painter, True), steps=30000, batch=8, rate=1e-3, bf16=True
    ),
    **{name: Recipe(partial(_make_ecar, name), steps=16000, batch=24, rate=1e-3) for name in ECAR},
}
