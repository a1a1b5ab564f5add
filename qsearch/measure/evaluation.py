"""evaluate(pipe, plan) -> metrics with standard errors: a plan is believed when it has been
measured.

Every plan gets the same captions and the same noise, so that differences are the plan's. A metric
is one file in `metrics/`; those with a value a sample get their standard error from the samples,
those over all samples (Fréchet) from a jackknife over `FOLDS` parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import plugins
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from .noise import relative_noise
from .pipelines import (
    Call,
    Prompts,
    Sampling,
    decode,
    latent_channels,
    model_of,
    needs,
    run,
    sample,
)
from .quantized_weights import QuantizedWeights
from .sets import compared_features
from .simulation import simulate

FOLDS = 8


@dataclass(frozen=True)
class Outcome:
    """What one plan makes.

    Attributes:
        prompts: what was sampled.
        latents: final latents [N, ...].
        pictures: [N, 3, H, W], or frames [N, T, 3, H, W], in [-1, 1]; [N, 0] where the pipeline
            makes none.
        outputs: the denoiser's outputs on the recorded calls.
        channels: of the latents; 0 where not known.
        real: of full precision's outcome, a folder of real pictures that sets of pictures are
            compared with.
    """

    prompts: Prompts
    latents: Tensor
    pictures: Tensor
    outputs: tuple[Tensor, ...]
    channels: int = 0
    real: Path | None = None

    def without(self, part: Tensor) -> Outcome:
        """The same outcome without the samples in `part` (a bool mask [N])."""
        kept = torch.nonzero(~part).flatten()
        p, chosen = self.prompts, kept.tolist()
        return Outcome(
            Prompts(
                tuple(p.texts[i] for i in chosen),
                tuple(p.captions[i] for i in chosen) if p.captions else (),
                tuple(p.values[i] for i in chosen) if p.values else (),
            ),
            self.latents[kept],
            self.pictures[kept],
            self.outputs,
            self.channels,
            self.real,
        )


def make(
    pipe: Any,
    graph: OpGraph,
    plan: Plan,
    prompts: Prompts,
    sampling: Sampling,
    calls: Sequence[Call] = (),
    *,
    weights: QuantizedWeights | None = None,
    progress: Callable[[int], None] | None = None,
    first: int = 0,
    sampled: Tensor | None = None,
) -> Outcome:
    """Sample the pipeline, and decode, with the components of the graph computing as the plan says.

    Args:
        pipe: a diffusers pipeline.
        graph: its graph.
        plan: the plan.
        prompts: what is sampled.
        sampling: how.
        calls: recorded denoiser calls to repeat as well.
        weights: what the plan needs besides, where it is calibrated.
        progress: hears how many samples were done.
        first: number of the first sample, which its noise depends on: a plan measured in two parts
            is measured as in one.
        sampled: final latents of the first prompts, where the plan made them before.
    """
    done = 0 if sampled is None else len(sampled)
    denoiser = model_of(pipe)
    with simulate(model_of(pipe, graph.components), plan, graph, weights):
        outputs = tuple(run(denoiser, call) for call in calls)
        latents = sampled if sampled is not None else torch.empty(0)
        if done < len(prompts):
            made = sample(pipe, prompts[done:], sampling, progress, first=first + done)
            latents = torch.cat([latents, made]) if done else made
        pictures = pictures_of(pipe, latents, sampling, prompts)
    return Outcome(prompts, latents, pictures, outputs, latent_channels(pipe))


def pictures_of(pipe: Any, latents: Tensor, sampling: Sampling, prompts: Prompts) -> Tensor:
    """Pictures of final latents by the pipeline itself, as many at once as are sampled at once;
    [N, 0] where it makes none.
    """
    try:
        return decode(pipe, latents, sampling.batch, sampling, prompts)
    except QSearchError:  # `check_metrics` says so before, where a metric looks at pictures
        return torch.empty(len(latents), 0)


@dataclass(frozen=True)
class Measurement:
    """A metric of one plan: its mean, standard error, and the samples' values where it has them."""

    mean: float
    error: float
    samples: tuple[float, ...] = ()


def measurements(
    outcome: Outcome, reference: Outcome, metrics: Sequence[str]
) -> dict[str, Measurement]:
    """Each metric of a plan's outcome against that of full precision.

    The standard error of a metric with a value a sample is the samples' deviation over the root of
    their number; of one over all samples a jackknife's, over `FOLDS` parts.
    """
    return {name: _measured(plugins.load("metrics", name), outcome, reference) for name in metrics}


def directions(metrics: Iterable[str]) -> dict[str, bool]:
    """metric -> whether more of it is better; of plug-ins, and of what `evaluate` adds to them."""
    own = {"noise": False, "output_sqnr": True}
    return {
        name: own[name] if name in own else plugins.load("metrics", name).higher_is_better
        for name in metrics
    }


def evaluate(
    outcome: Outcome, reference: Outcome, metrics: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Metrics of a plan's outcome against that of full precision.

    Args:
        outcome: what the plan makes (`make`).
        reference: what full precision makes of the same prompts and noise.
        metrics: names of plug-ins.

    Returns:
        metric -> (mean, standard error). Besides `metrics`: `noise`, the relative error of the
        denoiser's output on the recorded calls, and `output_sqnr`, the same in dB.

    Raises:
        QSearchError: a metric that looks at pictures, of a pipeline that makes none.
    """
    return evaluated(outcome, reference, metrics)[0]


def evaluated(
    outcome: Outcome, reference: Outcome, metrics: Sequence[str]
) -> tuple[dict[str, tuple[float, float]], dict[str, list[float]]]:
    """What `evaluate` returns, and metric -> the value of each sample, for differences between
    plans on the same samples.
    """
    unseen = [name for name in metrics if needs(plugins.load("metrics", name), "pictures")]
    if unseen and outcome.pictures.ndim < 4:
        raise QSearchError(
            f"{', '.join(unseen)} look at pictures, and the pipeline makes none of its latents; "
            "use metrics without pictures, such as sqnr"
        )
    measured = measurements(outcome, reference, metrics)
    found = {name: (m.mean, m.error) for name, m in measured.items()}
    if outcome.outputs:
        pairs = [
            relative_noise(a, b) for a, b in zip(outcome.outputs, reference.outputs, strict=True)
        ]
        value = sum(v for v, _ in pairs) / len(pairs)
        error = math.sqrt(sum(e * e for _, e in pairs)) / len(pairs)
        if math.isinf(error):  # calls of one sample each: the spread between calls
            spread = sum((v - value) ** 2 for v, _ in pairs) / max(1, len(pairs) - 1)
            error = math.sqrt(spread / len(pairs))
        found["noise"] = (value, error)
        if value > 0:
            found["output_sqnr"] = (-10 * math.log10(value), 10 / math.log(10) * error / value)
    return found, {name: list(m.samples) for name, m in measured.items() if m.samples}


def _measured(metric: Any, outcome: Outcome, reference: Outcome) -> Measurement:
    if hasattr(metric, "embed"):
        return _of_sets(metric, outcome, reference)
    value = metric.measure(outcome, reference)
    if isinstance(value, Tensor):
        n = len(value)
        error = float(value.std() / math.sqrt(n)) if n > 1 else 0.0
        return Measurement(float(value.mean()), error, tuple(value.tolist()))
    return Measurement(
        float(value),
        _jackknife(
            len(outcome.prompts),
            lambda part: metric.measure(outcome.without(part), reference.without(part)),
        ),
    )


def _of_sets(metric: Any, outcome: Outcome, reference: Outcome) -> Measurement:
    """A metric of sets: pictures go through its network once, and parts of their features are left
    out.
    """
    n = len(outcome.prompts)
    if n < 3:
        raise QSearchError(
            f"{metric.title} compares sets of pictures and needs three for its error bar; "
            "evaluate more samples, or leave the metric out"
        )
    made, own = metric.embed(outcome.pictures), compared_features(metric, reference)
    value = metric.distance(made, own)
    frames = len(made) // n

    def left(part: Tensor) -> float:
        kept = (~part).repeat_interleave(frames)
        paired = reference.real is None and len(own) == len(made)
        return float(metric.distance(made[kept], own[kept] if paired else own))

    return Measurement(value, _jackknife(n, left))


def _jackknife(count: int, left: Callable[[Tensor], float]) -> float:
    """Standard error by leaving out one of `FOLDS` parts at a time; `left`: the value without those
    in a mask [count].
    """
    folds = min(FOLDS, count)
    fold = torch.arange(count) % folds
    values = [left(fold == i) for i in range(folds)]
    mean = sum(values) / folds
    return math.sqrt((folds - 1) / folds * sum((v - mean) ** 2 for v in values))
