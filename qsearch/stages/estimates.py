"""Estimates: memory, passes and minutes of each verb before anything is loaded, from the headers of
the weights.

Multiply-accumulates of a layer are its weights times the places that it is applied to, which its
name tells: the level of a U-Net, picture or text tokens of a transformer, one for what reads the
time. Products inside attention are not counted. "About" is meant.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..measure.own import DENOISERS, read_config
from ..measure.sizes import components_in, held_in, tensors_in

if TYPE_CHECKING:
    from .folder import Run

#: share of a matrix product's speed that a whole denoiser reaches
_EFFICIENCY = 0.6
#: a backward pass takes twice the work of a forward one
_BACKWARD = 2.0
_TEXT = re.compile(r"context|add_[kqv]|text|caption|attn2\.to_[kv]|encoder_hid")
_ONCE = re.compile(r"time|guidance|norm|pooled|adaln|modulation|vector|label|add_embedding")
_TEXT_TOKENS = 77
_LONG_TEXT = 256
#: what lies along a side of a latent, where a VAE does not say
_SCALE = 8


@dataclass(frozen=True)
class Estimate:
    """What a verb takes. `passes`: calls of the denoiser; `memory`: bytes at its peak; `seconds`:
    on this machine.
    """

    verb: str
    passes: int
    memory: float
    seconds: float


def estimates(run: Run, speed: float | None = None) -> list[Estimate]:
    """What profile, evaluate and apply take with the run's settings; `speed`: multiply-accumulates
    a second, measured when left out.
    """
    from ..measure.estimators.probe import ROUND

    c, folder = run.config, run.model_folder
    parts = components_in(folder)
    whole = sum(held.parameters for held in parts.values())
    denoiser = sum(held_in(folder / name).parameters for name in denoisers_in(folder))
    width = {"float32": 4}.get(run.dtype, 2)
    rows = 2 if run.sampling.guidance > 1 else 1
    macs = macs_of_call(run)
    speed = speed or matmul_speed() * _EFFICIENCY
    loaded = whole * width
    p, batches = c.profile, -(-c.profile.samples // min(c.profile.batch, c.profile.samples))
    calls = run.bins * batches
    backwards = p.probes * calls * len(p.metrics)
    each = macs * rows * min(p.batch, p.samples)
    recording = macs * rows * p.samples * run.sampling.steps
    profile = Estimate(
        "profile",
        calls * -(-p.probes // ROUND) + 2 * backwards,
        loaded + denoiser * width,
        (recording + backwards * (1 + _BACKWARD) * each) / speed,
    )
    plans = 2 + (c.evaluate.uniform is not None) + c.evaluate.random
    calls = -(-run.samples // run.sampling.batch) * run.sampling.steps * plans
    evaluate = Estimate(
        "evaluate",
        calls,
        loaded + denoiser * width,
        macs * rows * run.samples * run.sampling.steps * plans / speed,
    )
    return [profile, evaluate, Estimate("apply", 0, loaded, loaded / 2e9)]


def denoisers_in(folder: Path) -> list[str]:
    """Names of a saved pipeline's denoisers."""
    found = [p.name for p in folder.iterdir() if p.is_dir()]
    named = [n for n in found if n in DENOISERS or re.fullmatch(r"(transformer|unet)_\d+", n)]
    first = [n for n in DENOISERS if n in named][:1]
    return sorted(n for n in named if first and n.startswith(first[0]))


def macs_of_call(run: Run) -> float:
    """Multiply-accumulates of one call of the denoiser for one picture, about."""
    folder = run.model_folder
    names = denoisers_in(folder)
    if not names:
        return 0.0
    size = run.own.sized(run.sampling) or (512, 512)
    vae = read_config(folder / "vae" / "config.json")
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    scale = 2 ** (len(levels) - 1) if isinstance(levels, list) else _SCALE
    frames = run.own.frames if run.sampling.frames is None else run.sampling.frames
    latents = -(-(frames or 1) // (vae.get("temporal_compression_ratio") or 4)) if frames else 1
    grid = size[0] / scale, size[1] / scale
    config = read_config(folder / names[0] / "config.json")
    places = _Places(config, grid[0] * grid[1] * latents)
    weights = tensors_in(folder / names[0])
    return float(
        sum(math.prod(shape) * places.of(name) for name, shape in weights if len(shape) > 1)
    )


class _Places:
    """How many places a layer of a denoiser is applied to, by its name."""

    def __init__(self, config: dict[str, Any], latents: float) -> None:
        self.levels = len(config.get("down_block_types") or ())
        patch = config.get("patch_size") or (1 if self.levels else 2)
        sides = list(patch)[-2:] if isinstance(patch, list) else [patch, patch]
        flux = "axes_dims_rope" in config and patch == 1
        self.latents: float = latents / (4 if flux else math.prod(sides))
        self.text = _TEXT_TOKENS if self.levels else _LONG_TEXT

    def of(self, name: str) -> float:
        if _ONCE.search(name):
            return 1.0
        if _TEXT.search(name):
            return float(self.text)
        if not self.levels:
            both = name.startswith("single_transformer_blocks")
            return self.latents + (self.text if both else 0)
        level = 0
        if (found := re.match(r"(down|up)_blocks\.(\d+)", name)) is not None:
            number = int(found[2])
            level = number if found[1] == "down" else self.levels - 1 - number
        elif name.startswith("mid_block"):
            level = self.levels - 1
        return float(self.latents / 4**level)


def matmul_speed(seconds: float = 0.15) -> float:
    """Multiply-accumulates a second of this machine's matrix product in fp32, measured."""
    import torch

    a = torch.randn(512, 512)
    a @ a
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        count += 1
    return float(count * 512**3 / (time.perf_counter() - began))
