"""Clean: the clean image that a call of the denoiser predicts, whatever the call returns (noise, velocity, flow).

Metrics of content compare pictures, not noise. For every parameterisation the prediction is linear, x0 = keep * x_t + take * output,
and guidance is linear too; so what the scheduler was given is compared with what the denoiser returned, and how a pipeline guides
need not be known: no code per pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.errors import QSearchError

#: relative residual above which the scheduler's input is no linear combination of the denoiser's output
_RESIDUAL = 1e-3


@dataclass(frozen=True)
class Clean:
    """Clean latents [N, ...] and, by a VAE where there is one, their pictures [N, 3, H, W] in [-1, 1]; `channels` of the latents, 0 where not known."""

    latents: Tensor
    decoder: Callable[[Tensor], Tensor] | None = None
    channels: int = 0

    @cached_property
    def pictures(self) -> Tensor:
        """Decoded once, with gradients. Raises `QSearchError` where nothing decodes these latents."""
        if self.decoder is None:
            raise QSearchError(
                "pictures need the pipeline's VAE; profile with `pipe=`, or leave out the metrics that look at pictures"
            )
        return self.decoder(self.latents)


@dataclass(frozen=True)
class Sampled:
    """What the sampler made of a call: x0 = keep * latents + take * (sum of guidance weights times the chunks of the output).

    `channels`: how many of the output's channels it used (PixArt's others are a learned variance).
    """

    latents: Tensor
    keep: float
    take: float
    guidance: tuple[float, ...]
    channels: int

    def clean(self, output: Tensor) -> Tensor:
        """The predicted clean latents [N, ...] for the denoiser's output [chunks * N, ...]."""
        chunks = output[:, : self.channels].chunk(len(self.guidance))
        guided = sum(w * chunk for w, chunk in zip(self.guidance, chunks, strict=True))
        return self.keep * self.latents + self.take * guided


def guidance_weights(output: Tensor, given: Tensor, scale: float) -> tuple[float, ...] | None:
    """Weights of the chunks of the denoiser's `output` in what the scheduler was `given` [N, ...]; None where it is no linear combination.

    Ordinary guidance at `scale` (unconditional first) is tried before least squares: where the caption changes nothing, any weights fit.
    """
    count, rest = divmod(len(output), len(given))
    if rest or not count or output.shape[1] < given.shape[1] or output.shape[2:] != given.shape[2:]:
        return None
    chunks = torch.stack(
        [c.flatten() for c in output[:, : given.shape[1]].double().chunk(count)], 1
    )
    target = given.double().flatten()
    tried = (
        [torch.tensor([1 - scale, scale], dtype=torch.double, device=target.device)]
        if count == 2
        else []
    )
    for weights in (*tried, torch.linalg.lstsq(chunks, target).solution):
        if (chunks @ weights - target).norm() <= _RESIDUAL * target.norm():
            return tuple(float(w) for w in weights)
    return None


def coefficients(scheduler: Any, timestep: Tensor | float) -> tuple[float, float]:
    """(keep, take) of a scheduler right after its step at `timestep`.

    Flow matching: x_t = (1 - s) x0 + s noise, output noise - x0. Variance preserving: x_t = a x0 + s noise. Variance exploding (Euler, Heun):
    x_t = x0 + s noise, the denoiser being fed x_t / sqrt(1 + s^2). Clipping and thresholding are left out.
    """
    config = scheduler.config
    flow = (
        "flow" in str(config.get("prediction_type", "")) or "FlowMatch" in type(scheduler).__name__
    )
    kind = "flow" if flow else str(config.get("prediction_type", "epsilon"))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        sigma = float(sigmas[scheduler.step_index - 1])
        if flow:
            return 1.0, -sigma
        alpha = 1 / (1 + sigma**2) ** 0.5
        if (
            float(scheduler.init_noise_sigma) > 1.5
        ):  # variance exploding; sqrt(1 + s^2) at the end of the noise schedule is 14 or so
            return {
                "epsilon": (1.0, -sigma),
                "v_prediction": (alpha**2, -sigma * alpha),
                "sample": (0.0, 1.0),
            }[kind]
        noise = sigma * alpha
    else:
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        alpha, noise = signal**0.5, (1 - signal) ** 0.5
    return {
        "epsilon": (1 / alpha, -noise / alpha),
        "v_prediction": (alpha, -noise),
        "sample": (0.0, 1.0),
    }[kind]
