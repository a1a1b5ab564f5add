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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import QSearchError
from ..measure.offloading import KINDS, WIDTHS, Sizes, blocks_in, fitting, peak_bytes
from ..measure.own import DENOISERS, read_config
from ..measure.sizes import (
    components_in,
    decoding_bytes,
    free_memory,
    free_on,
    tensors_in,
)

if TYPE_CHECKING:
    from .folder import Run

#: verbs that read the model's weights, in the order of work
VERBS = ("extract", "profile", "evaluate", "apply", "export")
#: bytes a second that are read and written again
_READING = 2e9
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
    """What a verb takes.

    Attributes:
        verb: its name.
        passes: calls of the denoiser.
        memory: offload (none, block, disk) -> bytes at the peak where the model computes; without
            block and disk where the model's files can't be streamed.
        seconds: on this machine.
        fits: the first offload that fits the free memory; "" where none does.
    """

    verb: str
    passes: int
    memory: Mapping[str, float]
    seconds: float
    fits: str


def estimates(run: Run, speed: float | None = None) -> list[Estimate]:
    """What each verb that reads the model takes with the run's settings, before it is loaded.

    Args:
        run: of a saved pipeline.
        speed: multiply-accumulates a second, measured when left out.

    Returns:
        An estimate each of extract, profile, evaluate, apply and export.
    """
    from ..measure.estimators.probe import ROUND

    c = run.config
    sizes, streams = sizes_of(run)
    rows = 2 if run.sampling.guidance > 1 else 1
    macs = macs_of_call(run)
    speed = speed or matmul_speed() * _EFFICIENCY
    p, batches = c.profile, -(-c.profile.samples // min(c.profile.batch, c.profile.samples))
    calls = run.bins * batches
    backwards = p.probes * calls * len(p.metrics)
    each = macs * rows * min(p.batch, p.samples)
    recording = macs * rows * p.samples * run.sampling.steps
    passes, seconds = {"profile": calls * -(-p.probes // ROUND) + 2 * backwards}, {}
    seconds["profile"] = (recording + backwards * (1 + _BACKWARD) * each) / speed
    plans = 2 + (c.evaluate.uniform is not None) + c.evaluate.random
    passes["evaluate"] = -(-run.samples // run.sampling.batch) * run.sampling.steps * plans
    seconds["evaluate"] = macs * rows * run.samples * run.sampling.steps * plans / speed
    free, ram = free_on(run.device), free_memory()
    kinds = KINDS if streams else KINDS[:1]
    return [
        Estimate(
            verb,
            passes.get(verb, 0),
            {kind: peak_bytes(sizes, verb, kind, run.device) for kind in kinds},
            seconds.get(verb, sizes.whole / _READING),
            fitting(sizes, verb, run.device, free, ram) if streams else "none",
        )
        for verb in VERBS
    ]


def sizes_of(run: Run) -> tuple[Sizes, bool]:
    """(what the run's pipeline takes in its type, whether its denoisers can be streamed)."""
    folder, width = run.model_folder, WIDTHS[run.dtype]
    parts = components_in(folder)
    whole = sum(held.parameters for held in parts.values()) * width
    denoisers = sum(parts[n].parameters for n in denoisers_in(folder) if n in parts) * width
    size = run.own.sized(run.sampling) or (512, 512)
    vae = read_config(folder / "vae" / "config.json")
    decoding = decoding_bytes(vae, size[0] * size[1], width) if vae else 0.0
    try:
        block, layer = blocks_in(folder, run.dtype)
    except QSearchError:  # of a class that can't be made without its weights
        return Sizes(whole, denoisers, denoisers, denoisers // width, decoding), False
    return Sizes(whole, denoisers, block, layer, decoding), True


def denoisers_in(folder: Path) -> list[str]:
    """Names of a saved pipeline's denoisers."""
    found = [p.name for p in folder.iterdir() if p.is_dir()]
    named = [n for n in found if n in DENOISERS or re.fullmatch(r"(transformer|unet)_\d+", n)]
    first = [n for n in DENOISERS if n in named][:1]
    return sorted(n for n in named if first and n.startswith(first[0]))


def macs_of_call(run: Run) -> float:
    """Multiply-accumulates of one call of the denoiser for one picture, about."""
    return float(sum(places * math.prod(shape) for shape, places in _applied(run)))


def activation_bytes(run: Run) -> float:
    """Bytes of what all layers of the denoiser make in one call for one sample: a backward pass
    keeps at least as many, unless blocks are computed again.
    """
    return float(sum(places * shape[0] for shape, places in _applied(run))) * WIDTHS[run.dtype]


def frames_of(run: Run) -> int:
    """Frames of what is sampled; 1 for pictures."""
    return run.sampling.frames or run.own.frames or 1


def _applied(run: Run) -> list[tuple[tuple[int, ...], float]]:
    """(shape of a weight, places that it is applied to) of each layer of the first denoiser."""
    folder = run.model_folder
    names = denoisers_in(folder)
    if not names:
        return []
    size = run.own.sized(run.sampling) or (512, 512)
    vae = read_config(folder / "vae" / "config.json")
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    scale = 2 ** (len(levels) - 1) if isinstance(levels, list) else _SCALE
    scale = vae.get("scale_factor_spatial") or scale
    step = vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal") or 4
    latents = -(-frames_of(run) // step)
    config = read_config(folder / names[0] / "config.json")
    places = _Places(config, size[0] / scale * (size[1] / scale) * latents)
    weights = tensors_in(folder / names[0])
    return [(tuple(shape), places.of(name)) for name, shape in weights if len(shape) > 1]


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
