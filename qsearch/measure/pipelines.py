"""Any diffusers pipeline as a denoiser with recorded inputs: load, call with common noise, record, without code per pipeline.

What pipelines differ in (which module denoises, which call arguments exist) is asked of the pipeline itself: its components and
the signature of its `__call__`. Every sample has a generator of its own, so its noise does not depend on the batch it is in.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..zoo.scenes import Caption, describe, draw_scenes
from .clean import Sampled, coefficients, guidance_weights

DENOISERS = ("transformer", "unet", "prior")
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
    """How pictures are made: solver steps, guidance scale, seed of the first sample's noise, samples a batch; the pipeline's own size when left out."""

    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    batch: int = 32
    resolution: int | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Call:
    """The arguments of one recorded call of the denoiser and the sampler step it came from; calls of one step are parts of one batch.

    `sampled`: what the sampler made of the output, where that is known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    sampled: Sampled | None = None


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
        except (
            Exception
        ) as error:  # diffusers and transformers raise many kinds for a broken folder
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise QSearchError(
                f"{folder} must hold a whole diffusers pipeline; loading it failed: {reason}"
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device, torch.float32)


def denoiser_of(pipe: Any) -> nn.Module:
    """The module of the pipeline that denoises (its transformer or U-Net)."""
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise QSearchError(
        f"{type(pipe).__name__} has none of the components {', '.join(DENOISERS)}; give the denoiser as a module"
    )


def scene_prompts(count: int, seed: int) -> Prompts:
    """Captions of held-out scenes: no training saw these combinations of attributes."""
    generator = torch.Generator().manual_seed(seed)
    captions = tuple(describe(draw_scenes(count, generator, held_out=True), generator))
    return Prompts(tuple(c.text for c in captions), captions)


def arguments(pipe: Any, texts: Sequence[str], first: int, sampling: Sampling) -> dict[str, Any]:
    """Arguments of the pipeline's call for `texts`, the first of which is sample number `first` of the seed: its noise depends on that alone."""
    known = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {
        "prompt": list(texts),
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "generator": [
            torch.Generator().manual_seed(sampling.seed * 1_000_003 + first + i)
            for i in range(len(texts))
        ],
        "output_type": "latent",
        **_PLAIN,
    }
    sizes = {
        "height": sampling.resolution,
        "width": sampling.resolution,
        "num_frames": sampling.frames,
    }
    wanted |= {name: size for name, size in sizes.items() if size is not None}
    longest = getattr(getattr(pipe, "tokenizer", None), "model_max_length", 10**9)
    if "max_sequence_length" in known and longest < known["max_sequence_length"].default:
        wanted["max_sequence_length"] = longest
    return {k: v for k, v in wanted.items() if k in known}


@torch.no_grad()
def sample(
    pipe: Any, prompts: Prompts, sampling: Sampling, progress: Any = None, *, first: int = 0
) -> Tensor:
    """Final latents [N, ...] for the prompts, each with its own noise, that of the samples from number `first` on. Raises `QSearchError` when they are not finite."""
    parts = []
    for i in range(0, len(prompts), sampling.batch):
        parts.append(
            _tensor(
                pipe(**arguments(pipe, prompts.texts[i : i + sampling.batch], first + i, sampling))
            )
            .float()
            .cpu()
        )
        if progress is not None:
            progress(len(parts[-1]))
    latents = torch.cat(parts)
    if not torch.isfinite(latents).all():
        raise QSearchError(
            f"{type(pipe).__name__} made latents that are not finite; is the model whole, or the plan too coarse?"
        )
    return latents


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, batch: int = 64) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] of final latents."""
    return torch.cat([decode_batch(pipe, chunk).cpu() for chunk in latents.split(batch)])


def decode_batch(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] of one batch of latents [N, C, h, w], with gradients. Raises `QSearchError` for latents that are no pictures' maps."""
    vae = getattr(pipe, "vae", None)
    if vae is None or latents.ndim != 4:
        shape = " x ".join(map(str, latents.shape))
        raise QSearchError(
            f"pictures are decoded from maps [N, C, h, w] by a VAE; {type(pipe).__name__} has latents {shape}: use metrics without pictures"
        )
    z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (
        getattr(vae.config, "shift_factor", None) or 0.0
    )
    pictures: Tensor = vae.decode(z, return_dict=False)[0].float().clamp(-1, 1)
    return pictures


def latent_channels(pipe: Any) -> int:
    """Channels of the latents by the VAE's own configuration; 0 without a VAE that says."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    return int(config.get("latent_channels") or config.get("z_dim") or 0)


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Inside, no weight of the pipeline but the denoiser's wants a gradient; nothing without a pipeline."""
    model = None if pipe is None else denoiser_of(pipe)
    parts = (
        []
        if pipe is None
        else [p for p in pipe.components.values() if isinstance(p, nn.Module) and p is not model]
    )
    flags = {p: p.requires_grad for part in parts for p in part.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@dataclass
class _Heard:
    """Calls as they come, and the outputs that the sampler has not yet taken."""

    calls: list[Call]
    outputs: list[Tensor]


@contextmanager
def _listening(pipe: Any, guidance: float) -> Iterator[_Heard]:
    """Hears the denoiser's calls, and what the scheduler makes of them; the pipeline computes as ever."""
    model, scheduler, heard = denoiser_of(pipe), getattr(pipe, "scheduler", None), _Heard([], [])

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.calls.append(Call(args, dict(kwargs), len(heard.calls)))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        heard.outputs.append(_tensor(output))

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    if scheduler is not None:
        own = scheduler.step

        @functools.wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            made = own(*args, **kwargs)
            given = inspect.signature(own).bind(*args, **kwargs).arguments
            if (
                len(heard.outputs) == 1
            ):  # else several calls make one step, and none of them predicts an image of its own
                sampled = _sampled(scheduler, given, heard.outputs[0], guidance)
                heard.calls[-1] = replace(heard.calls[-1], sampled=sampled)
            heard.outputs.clear()
            return made

        scheduler.step = step
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
        if scheduler is not None:
            del scheduler.step


def _sampled(
    scheduler: Any, given: dict[str, Any], output: Tensor, guidance: float
) -> Sampled | None:
    weights = guidance_weights(output, given["model_output"], guidance)
    if weights is None:
        return None
    try:
        keep, take = coefficients(scheduler, given["timestep"])
    except (
        KeyError,
        AttributeError,
        TypeError,
    ):  # a scheduler of its own kind; metrics of the clean image say so when they are asked for
        return None
    return Sampled(given["sample"], keep, take, weights, given["model_output"].shape[1])


def record(
    pipe: Any, prompts: Prompts, sampling: Sampling, bins: int, batch: int | None = None
) -> list[Call]:
    """The denoiser's calls in the middle of each of `bins` equal parts of the sampler's steps, from one full-precision run.

    With `batch`, that many samples run at a time, and each bin has several calls (of the same `step`), one a part of the samples.
    """
    ends = [0]
    with _listening(pipe, sampling.guidance) as heard:
        sample(
            pipe,
            prompts,
            replace(sampling, batch=batch or len(prompts)),
            lambda _: ends.append(len(heard.calls)),
        )
    parts = [heard.calls[a:b] for a, b in itertools.pairwise(ends)]
    count = len(parts[0])
    if not 1 <= bins <= count:
        raise QSearchError(
            f"step bins must lie between 1 and the number of denoiser calls; given {bins} bins for {count} calls"
        )
    middle = [int((b + 0.5) * count / bins) for b in range(bins)]
    return [replace(part[m], step=m) for m in middle for part in parts]


def forward(model: nn.Module, call: Call) -> Tensor:
    """The denoiser's output [N, ...] for a recorded call, as fp32, with gradients."""
    kwargs = (
        {**call.kwargs, "return_dict": False}
        if "return_dict" in inspect.signature(model.forward).parameters
        else call.kwargs
    )
    return _tensor(model(*call.args, **kwargs)).float()


def _tensor(made: Any) -> Tensor:
    """The first tensor of what a denoiser returns: itself, the first of a tuple, or the first field of diffusers' output classes."""
    found: Tensor = made if isinstance(made, Tensor) else made[0]
    return found


@torch.no_grad()
def run(model: nn.Module, call: Call) -> Tensor:
    """`forward` without gradients."""
    return forward(model, call)


def example_inputs(call: Call, model: nn.Module) -> dict[str, Any]:
    """A recorded call as keyword arguments of the model's forward, for `extract`."""
    signature = inspect.signature(model.forward)
    inputs: dict[str, Any] = {}
    for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
        inputs |= (
            value
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            else {name: value}
        )
    return inputs
