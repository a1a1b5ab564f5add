"""PredictedX0 and SchedulerStep: the clean image that a call of the denoiser predicts, whatever the
call returns (noise, velocity, flow).

Metrics of content compare pictures, not noise. For every parameterisation the prediction is linear,
x0 = keep * x_t + take * output, and guidance is linear too; so what the scheduler was given is
compared with what the denoiser returned, and how a pipeline guides need not be known: no code per
pipeline.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.errors import QSearchError

#: relative residual above which the scheduler's input is no linear combination of the denoiser's
#: output
_RESIDUAL = 1e-3


@dataclass(frozen=True)
class PredictedX0:
    """PredictedX0 latents [N, ...] and, by a VAE where there is one, their pictures [N, 3, H, W] in
    [-1, 1]; `channels` of the latents, 0 where not known.
    """

    latents: Tensor
    decoder: Callable[[Tensor], Tensor] | None = None
    channels: int = 0

    @cached_property
    def pictures(self) -> Tensor:
        """Decoded once, with gradients. Raises `QSearchError` where nothing decodes these
        latents.
        """
        if self.decoder is None:
            raise QSearchError(
                "pictures need the pipeline's VAE; profile with `pipe=`, or leave out "
                "the metrics that look at pictures"
            )
        return self.decoder(self.latents)


@dataclass(frozen=True)
class SchedulerStep:
    """What the sampler made of a call: x0 = keep * latents + take * (sum of guidance weights times
    the chunks of the output + rest).

    Attributes:
        latents: what the scheduler was given [N, ...].
        keep: coefficient of the latents.
        take: coefficient of the guided output.
        guidance: weights of the chunks of the output.
        channels: how many of the output's channels it used (PixArt's others are a learned
            variance).
        rest: what other calls of the same step gave to the guided output (guidance in two calls).
    """

    latents: Tensor
    keep: float
    take: float
    guidance: tuple[float, ...]
    channels: int
    rest: Tensor | None = None

    def clean(self, output: Tensor) -> Tensor:
        """The predicted clean latents [N, ...] for the denoiser's output [chunks * N, ...]."""
        chunks = _chunks(output, self.latents.shape, len(self.guidance), self.channels)
        guided = sum(w * chunk for w, chunk in zip(self.guidance, chunks, strict=True))
        if self.rest is not None:
            guided = guided + self.rest
        return self.keep * self.latents + self.take * guided


def _chunks(output: Tensor, shape: torch.Size, count: int, channels: int) -> list[Tensor]:
    """The chunks of an output as [N, ...] of the latents' shape."""
    if output.shape[1:] != shape[1:] and output[0].numel() != shape[1:].numel():
        output = output[:, :channels]
    output = output[:, : shape[1]] if output[0].numel() > shape[1:].numel() else output
    return [chunk.reshape(shape) for chunk in output.chunk(count)]


def guidance_weights(output: Tensor, given: Tensor, scale: float) -> tuple[float, ...] | None:
    """`step_weights` of a step of one call."""
    found = step_weights([output], given, scale)
    return None if found is None else found[0]


def step_weights(
    outputs: Sequence[Tensor], given: Tensor, scale: float
) -> tuple[tuple[float, ...], ...] | None:
    """Weights of the chunks of each of a step's outputs in what the scheduler was given; None where
    it is no linear combination.

    Args:
        outputs: what the denoiser returned in the step's calls, [chunks * N, ...] each.
        given: the scheduler's `model_output` [N, ...].
        scale: of guidance; ordinary guidance (unconditional first) is tried before least squares,
            since any weights fit where the caption changes nothing.
    """
    found: list[Tensor] = []
    counts = []
    for output in outputs:
        count, rest = divmod(len(output), len(given))
        exact = output[0].numel() == given[0].numel()
        wider = output.ndim == given.ndim and output.shape[2:] == given.shape[2:]
        if rest or not count or not (exact or (wider and output.shape[1] >= given.shape[1])):
            return None
        counts.append(count)
        found += _chunks(output, given.shape, count, given.shape[1])
    chunks = torch.stack([c.flatten().double() for c in found], 1)
    target = given.double().flatten()
    tried = []
    if len(found) == 2:
        pair = torch.tensor([1 - scale, scale], dtype=torch.double, device=target.device)
        tried = [pair] if len(outputs) == 1 else [pair, pair.flip(0)]
    for weights in (*tried, _least_squares(chunks, target)):
        if (chunks @ weights - target).norm() <= _RESIDUAL * target.norm():
            numbers = iter(weights.tolist())
            return tuple(tuple(next(numbers) for _ in range(count)) for count in counts)
    return None


def _least_squares(columns: Tensor, target: Tensor) -> Tensor:
    """Weights of least squared residual, the shortest of them where columns repeat."""
    square = columns.T @ columns
    found: Tensor = torch.linalg.pinv(square, rtol=1e-12, hermitian=True) @ (columns.T @ target)
    return found


def own_prediction(scheduler: Any, given: Mapping[str, Any]) -> Tensor | None:
    """The clean latents that a solver converts the output to (DPM-Solver++, UniPC, SA-Solver),
    before its step; None where it does not.
    """
    config = getattr(scheduler, "config", {})
    convert = getattr(scheduler, "convert_model_output", None)
    kind = str(config.get("algorithm_type", ""))
    to_clean = "++" in kind or "data_prediction" in kind or bool(config.get("predict_x0"))
    if convert is None or not to_clean:
        return None
    twin = copy.copy(scheduler)
    try:
        if twin.step_index is None:
            twin._init_step_index(given["timestep"])
        found = twin.convert_model_output(given["model_output"], sample=given["sample"])
    except Exception:  # a solver with other arguments: its coefficients are not known then
        return None
    return found if isinstance(found, Tensor) else None


def checked(
    scheduler: Any, given: Mapping[str, Any], made: Any, predicted: Tensor | None
) -> tuple[float, float] | str:
    """(keep, take) of a step just made, which agree with the scheduler's own prediction; in words
    why they are not known.

    Args:
        scheduler: right after its step.
        given: the arguments of the step by name.
        made: what the step returned.
        predicted: what `own_prediction` found before it.
    """
    own = predicted if predicted is not None else _told(scheduler, made)
    name, sample = type(scheduler).__name__, given["sample"]
    output = given["model_output"]
    if output.shape != sample.shape:
        output = output[:, : sample.shape[1]]
    config = getattr(scheduler, "config", {})
    known = "prediction_type" in config or "FlowMatch" in name
    try:
        formula = coefficients(scheduler, given.get("timestep", 0)) if known else None
    except (KeyError, AttributeError, TypeError, IndexError, ValueError):
        formula = None  # a scheduler of its own kind
    if own is None or own.shape != sample.shape or output.shape != sample.shape:
        return formula or f"{name} does not say which clean image it predicts"
    inside = own.abs() < own.abs().max() * (1 - 1e-6)  # the others may be clipped
    x, y, target = (t[inside].double() for t in (sample, output, own))
    fitted = _least_squares(torch.stack([x, y], 1), target) if len(target) else None
    tried = [formula] if formula else []
    tried += [] if fitted is None else [(float(fitted[0]), float(fitted[1]))]
    for keep, take in tried:
        if (keep * x + take * y - target).norm() <= _RESIDUAL * target.norm():
            return keep, take
    return f"the clean image that {name} predicts is not linear in what it is given (thresholding?)"


def _told(scheduler: Any, made: Any) -> Tensor | None:
    """`pred_original_sample` of what a step returned, as a field or as the second of a tuple."""
    if not isinstance(made, tuple):
        found = getattr(made, "pred_original_sample", None)
        return found if isinstance(found, Tensor) else None
    told = str(inspect.signature(type(scheduler).step).return_annotation)
    module = vars(sys.modules[type(scheduler).__module__])
    fields = [
        list(getattr(value, "__dataclass_fields__", {}))
        for name, value in module.items()
        if name.endswith("Output") and name in told
    ]
    second = len(made) > 1 and any(f[1:2] == ["pred_original_sample"] for f in fields)
    return made[1] if second and isinstance(made[1], Tensor) else None


def coefficients(scheduler: Any, timestep: Tensor | float) -> tuple[float, float]:
    """(keep, take) of a scheduler right after its step at `timestep`.

    Flow matching: x_t = (1 - s) x0 + s noise, output noise - x0. Variance preserving: x_t = a x0 +
    s noise. Variance exploding (Euler, Heun): x_t = x0 + s noise, the denoiser being fed x_t /
    sqrt(1 + s^2). Clipping and thresholding are left out.
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
