"""Any diffusers pipeline as a denoiser with recorded inputs: load, call with common noise, record, without code per pipeline.

What pipelines differ in (which module denoises, which call arguments exist) is asked of the pipeline itself: its components and
the signature of its `__call__`. Every sample has a generator of its own, so its noise does not depend on the batch it is in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..zoo.scenes import Caption, describe, draw_scenes

_DENOISERS = ("transformer", "unet", "prior")
#: what is asked of a call where the pipeline's signature has it: cleaning needs packages that change the prompt, binning a resolution table
_PLAIN = {"clean_caption": False, "use_resolution_binning": False}


@dataclass(frozen=True)
class Prompts:
    """Texts for a pipeline and, where they describe scenes of the zoo's world, what the judge should find."""

    texts: tuple[str, ...]
    captions: tuple[Caption, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.texts[part], self.captions[part])


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: solver steps, guidance scale, seed of the first sample's noise, samples a batch."""

    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    batch: int = 32


@dataclass(frozen=True)
class Call:
    """The arguments of one recorded call of the denoiser and the sampler step it came from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without the libraries' bars and advice, which would drown our own lines; errors are raised all the same."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def load_pipeline(folder: Path, device: str = "cpu") -> Any:
    """A saved diffusers pipeline on `device`, in fp32 whatever type its files are in."""
    with _quiet():
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # diffusers and transformers raise many kinds for a broken folder
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise QSearchError(f"{folder} must hold a whole diffusers pipeline; loading it failed: {reason}") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device, torch.float32)


def denoiser_of(pipe: Any) -> nn.Module:
    """The module of the pipeline that denoises (its transformer or U-Net)."""
    for name in _DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise QSearchError(f"{type(pipe).__name__} has none of the components {', '.join(_DENOISERS)}; give the denoiser as a module")


def scene_prompts(count: int, seed: int) -> Prompts:
    """Captions of held-out scenes: no training saw these combinations of attributes."""
    generator = torch.Generator().manual_seed(seed)
    captions = tuple(describe(draw_scenes(count, generator, held_out=True), generator))
    return Prompts(tuple(c.text for c in captions), captions)


def _arguments(pipe: Any, texts: Sequence[str], first: int, sampling: Sampling) -> dict[str, Any]:
    known = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {
        "prompt": list(texts),
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "generator": [torch.Generator().manual_seed(sampling.seed * 1_000_003 + first + i) for i in range(len(texts))],
        "output_type": "latent",
        **_PLAIN,
    }
    longest = getattr(getattr(pipe, "tokenizer", None), "model_max_length", 10**9)
    if "max_sequence_length" in known and longest < known["max_sequence_length"].default:
        wanted["max_sequence_length"] = longest
    return {k: v for k, v in wanted.items() if k in known}


@torch.no_grad()
def sample(pipe: Any, prompts: Prompts, sampling: Sampling, progress: Any = None) -> Tensor:
    """Final latents [N, ...] for the prompts, each with its own noise. Raises `QSearchError` when they are not finite."""
    parts = []
    for i in range(0, len(prompts), sampling.batch):
        parts.append(pipe(**_arguments(pipe, prompts.texts[i : i + sampling.batch], i, sampling)).images.float().cpu())
        if progress is not None:
            progress(len(parts[-1]))
    latents = torch.cat(parts)
    if not torch.isfinite(latents).all():
        raise QSearchError(f"{type(pipe).__name__} made latents that are not finite; is the model whole, or the plan too coarse?")
    return latents


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, batch: int = 64) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] of final latents."""
    vae = pipe.vae
    parts = []
    for chunk in latents.split(batch):
        z = chunk.to(vae.device, vae.dtype) / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        parts.append(vae.decode(z, return_dict=False)[0].float().clamp(-1, 1).cpu())
    return torch.cat(parts)


@contextmanager
def _listening(module: nn.Module, heard: list[Call]) -> Any:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.append(Call(args, dict(kwargs), len(heard)))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def record(pipe: Any, prompts: Prompts, sampling: Sampling, bins: int) -> list[Call]:
    """The denoiser's calls in the middle of each of `bins` equal parts of the sampler's steps, from one full-precision run."""
    heard: list[Call] = []
    with _listening(denoiser_of(pipe), heard):
        sample(pipe, prompts, Sampling(sampling.steps, sampling.guidance, sampling.seed, batch=len(prompts)))
    if not 1 <= bins <= len(heard):
        raise QSearchError(f"step bins must lie between 1 and the number of denoiser calls; given {bins} bins for {len(heard)} calls")
    return [heard[int((b + 0.5) * len(heard) / bins)] for b in range(bins)]


@torch.no_grad()
def run(model: nn.Module, call: Call) -> Tensor:
    """The denoiser's output [N, ...] for a recorded call, as fp32."""
    kwargs = {**call.kwargs, "return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else call.kwargs
    made = model(*call.args, **kwargs)
    output: Tensor = made[0] if isinstance(made, tuple) else made
    return output.float()


def example_inputs(call: Call, model: nn.Module) -> dict[str, Any]:
    """A recorded call as keyword arguments of the model's forward, for `extract`."""
    signature = inspect.signature(model.forward)
    inputs: dict[str, Any] = {}
    for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
        inputs |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return inputs
