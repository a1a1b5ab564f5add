"""evaluate(pipe, plan) -> metrics with standard errors: a plan is believed when it has been measured.

Every plan gets the same captions and the same noise, so that differences are the plan's. A metric is one file in `metrics/`;
those with a value a sample get their standard error from the samples, those over all samples (Fréchet) from a jackknife
over `FOLDS` parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import plugins
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from .noise import relative_noise
from .pipelines import Call, Prompts, Sampling, decode, denoiser_of, latent_channels, run, sample
from .simulation import QuantizedWeights, simulate

FOLDS = 8


@dataclass(frozen=True)
class Outcome:
    """What one plan makes: final latents (of `channels`) and pictures [N, 3, H, W] in [-1, 1] for the prompts, the denoiser's outputs on the recorded calls."""

    prompts: Prompts
    latents: Tensor
    pictures: Tensor
    outputs: tuple[Tensor, ...]
    channels: int = 0

    def without(self, part: Tensor) -> Outcome:
        """The same outcome without the samples in `part` (a bool mask [N])."""
        kept = torch.nonzero(~part).flatten()
        captions = (
            tuple(self.prompts.captions[i] for i in kept.tolist()) if self.prompts.captions else ()
        )
        return Outcome(
            Prompts(tuple(self.prompts.texts[i] for i in kept.tolist()), captions),
            self.latents[kept],
            self.pictures[kept],
            self.outputs,
            self.channels,
        )


def make(
    pipe: Any,
    graph: OpGraph,
    plan: BitPlan,
    prompts: Prompts,
    sampling: Sampling,
    calls: Sequence[Call] = (),
    *,
    weights: QuantizedWeights | None = None,
    progress: Callable[[int], None] | None = None,
    first: int = 0,
) -> Outcome:
    """Sample the pipeline with its denoiser computing as the plan says; `calls` are recorded denoiser calls to repeat as well.

    `first`: number of the first sample, which its noise depends on: a plan measured in two parts is measured as in one.
    """
    model = denoiser_of(pipe)
    with simulate(model, plan, graph, weights):
        outputs = tuple(run(model, call) for call in calls)
        latents = sample(pipe, prompts, sampling, progress, first=first)
    return Outcome(prompts, latents, decode(pipe, latents), outputs, latent_channels(pipe))


def evaluate(
    outcome: Outcome, reference: Outcome, metrics: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """metric -> (mean, standard error) of a plan's outcome against that of full precision.

    Besides `metrics`: `noise`, the relative error of the denoiser's output on the recorded calls, and `output_sqnr`, the same in dB.
    """
    found = {name: _measured(plugins.load("metrics", name), outcome, reference) for name in metrics}
    if outcome.outputs:
        pairs = [
            relative_noise(a, b) for a, b in zip(outcome.outputs, reference.outputs, strict=True)
        ]
        value = sum(v for v, _ in pairs) / len(pairs)
        error = math.sqrt(sum(e * e for _, e in pairs)) / len(pairs)
        found["noise"] = (value, error)
        if value > 0:
            found["output_sqnr"] = (-10 * math.log10(value), 10 / math.log(10) * error / value)
    return found


def _measured(metric: Any, outcome: Outcome, reference: Outcome) -> tuple[float, float]:
    value = metric.measure(outcome, reference)
    if isinstance(value, Tensor):
        n = len(value)
        return float(value.mean()), float(value.std() / math.sqrt(n)) if n > 1 else 0.0
    n = len(outcome.prompts)
    folds = min(FOLDS, n)
    fold = torch.arange(n) % folds
    left = [
        metric.measure(outcome.without(fold == i), reference.without(fold == i))
        for i in range(folds)
    ]
    mean = sum(left) / folds
    return float(value), math.sqrt((folds - 1) / folds * sum((v - mean) ** 2 for v in left))
