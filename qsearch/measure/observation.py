"""Observation: what is compared when a choice changes the model: features of a recorded call's
output, or of what a whole trajectory ends in.

Estimators know nothing of pipelines, steps or metrics: they ask an observation for its features
(differentiable, the same at every call but for the model's weights) and for the scale by which a
squared distance of features is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core import plugins
from ..core.errors import QSearchError
from ..graphs.components import Components
from .calls import Call, forward, measuring, repeated, run
from .noise import ratio
from .predicted_x0 import PredictedX0

#: the metric of the denoiser's own output, which needs no clean image
NOISE = "noise"
#: a batch cut in another way gives the same numbers up to rounding; where it doesn't, it was cut
#: wrongly
_SAME = 1e-4


class AbstractObservation(Protocol):
    """One part of the samples at one step bin (or along one whole trajectory)."""

    #: index of the step bin; 0 for a trajectory
    bin: int
    #: during a backward, the sampler step whose gradient appears now
    now: int

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the model that run in it; "" is a single denoiser."""
        ...

    @property
    def sampler_steps(self) -> int:
        """How many sampler steps belong to it."""
        ...

    def features(self) -> dict[str, Tensor]:
        """Metric -> features [N, F] of the model as it is now, with gradients where they are
        enabled.
        """
        ...

    @property
    def _measured(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Metric -> features and scale in full precision."""
        ...

    @property
    def reference(self) -> dict[str, Tensor]:
        """Metric -> features [N, F] in full precision."""
        return {name: features for name, (features, _) in self._measured.items()}

    @property
    def scale(self) -> dict[str, Tensor]:
        """Metric -> [N] in fp64: the metric's value is the sum of squared distances to the
        reference over the sum of scales.
        """
        return {name: scale for name, (_, scale) in self._measured.items()}

    def example(self) -> Call:
        """One call of the denoiser as this observation makes it."""
        ...

    def floor(self) -> dict[str, float]:
        """What each metric reads when nothing was changed but the order in which floats are added
        up.
        """
        ...


class StepObservation(AbstractObservation):
    """A recorded call of the denoiser. Make it while the model is in full precision: the reference
    is taken then.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        bin: int,
        metrics: Sequence[str],
        decoder: Callable[[Tensor], Tensor] | None = None,
        channels: int = 0,
    ) -> None:
        self.model, self.call, self.bin, self.metrics, self.decoder, self.channels = (
            model,
            call,
            bin,
            tuple(metrics),
            decoder,
            channels,
        )
        self.now = 0
        if call.sampled is None and set(metrics) - {NOISE}:
            why = call.unsampled or "no diffusers pipeline recorded it, or its step is unknown"
            raise QSearchError(
                f"{', '.join(set(metrics) - {NOISE})} look at the clean image that a call "
                "predicts; how the sampler uses this call is not known "
                f"({why}): measure {NOISE}, or whole trajectories"
            )

    @property
    def components(self) -> tuple[str, ...]:
        """The one that was called."""
        return (self.call.component,)

    @property
    def sampler_steps(self) -> int:
        """One."""
        return 1

    def example(self) -> Call:
        """The recorded call."""
        return self.call

    @cached_property
    def _output(self) -> Tensor:
        output = run(self.model, self.call)
        if not torch.isfinite(output).all():
            raise QSearchError(
                f"the denoiser's output is not finite in step bin {self.bin}; the first "
                "layer to make such numbers is "
                f"{first_bad(self.model, partial(run, self.model, self.call))}"
            )
        if not output.any():
            raise QSearchError(
                "noise is measured relative to the output; the reference output is all "
                "zeros, is the model trained?"
            )
        repeated(self.model, partial(run, self.model, self.call), output)
        return output

    def _clean(self, output: Tensor) -> PredictedX0 | None:
        return (
            None
            if self.call.sampled is None
            else PredictedX0(self.call.sampled.clean(output), self.decoder, self.channels)
        )

    @cached_property
    def _own(self) -> PredictedX0 | None:
        return self._clean(self._output)

    @cached_property
    def _measured(self) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return measured(self.metrics, self._output, self._own, self._output, self._own)

    def features(self) -> dict[str, Tensor]:
        """Features of the model as it is now."""
        _ = self._measured  # in full precision, if this is the first call
        output = forward(self.model, self.call)
        made = measured(self.metrics, output, self._clean(output), self._output, self._own)
        return {name: features for name, (features, _) in made.items()}

    def floor(self) -> dict[str, float]:
        """Each metric when the samples of the batch run one at a time; 0 where the call can't be
        cut.
        """
        n, unknown = len(self._output), dict.fromkeys(self.metrics, 0.0)
        if n < 2:
            return unknown
        try:
            parts = torch.cat(
                [run(self.model, cut(self.call, slice(i, i + 1), n)) for i in range(n)]
            )
        except (
            RuntimeError,
            ValueError,
            IndexError,
            AssertionError,
        ):  # a tensor was cut whose first axis is not the samples'
            return unknown
        if (
            parts.shape != self._output.shape
            or not distance(parts, self._output, self._output.double().flatten(1).square().sum(1))[
                0
            ]
            < _SAME
        ):
            return unknown
        with torch.no_grad():
            return compared(
                measured(self.metrics, parts, self._clean(parts), self._output, self._own), self
            )


def measured(
    metrics: Sequence[str],
    output: Tensor | None,
    clean: PredictedX0 | None,
    reference_output: Tensor | None,
    reference: PredictedX0 | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Metric -> (features [N, F], scale [N])."""
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name in metrics:
        if name == NOISE:
            if output is None or reference_output is None:
                raise QSearchError(
                    f"{NOISE} is that of a denoiser's call; of a whole trajectory measure "
                    "sqnr, the same of the final latents"
                )
            made[name] = output.flatten(1), reference_output.double().flatten(1).square().sum(1)
        else:
            metric = plugins.load("metrics", name)
            if not hasattr(metric, "features"):
                raise QSearchError(
                    f"{name} has no gradients that a sensitivity could be measured by; it is for "
                    "evaluate"
                )
            features, scale = metric.features(clean, reference)
            made[name] = features.flatten(1), scale.double()
    return made


def compared(
    made: dict[str, tuple[Tensor, Tensor]], observation: AbstractObservation
) -> dict[str, float]:
    """Metric -> its value for what was `measured` of the same samples as the observation's
    reference.
    """
    return {
        name: distance(features, observation.reference[name], observation.scale[name])[0]
        for name, (features, _) in made.items()
    }


def distance(features: Tensor, reference: Tensor, scale: Tensor) -> tuple[float, float]:
    """(sum of squared distances over the sum of scales, its standard error over the samples)."""
    return ratio((features - reference).double().flatten(1).square().sum(1), scale)


def observations(
    model: nn.Module,
    calls: Sequence[Call],
    metrics: Sequence[str],
    decoder: Callable[[Tensor], Tensor] | None = None,
    channels: int = 0,
) -> list[StepObservation]:
    """One for each call; calls of the same sampler step are parts of the same bin."""
    bins = {step: i for i, step in enumerate(sorted({call.step for call in calls}))}
    return [
        StepObservation(model, call, bins[call.step], metrics, decoder, channels) for call in calls
    ]


def cut(call: Call, part: slice, size: int) -> Call:
    """The call with some of its `size` samples: every tensor whose first axis has that length is
    cut, in dicts and sequences too.
    """

    def of(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[part] if x.ndim > 0 and x.shape[0] == size else x
        if isinstance(x, dict):
            return {k: of(v) for k, v in x.items()}
        if type(x) is list and len(x) == size and _one_a_sample(x, size):
            return x[part]
        return type(x)(of(v) for v in x) if type(x) in (list, tuple) else x

    return replace(call, args=of(call.args), kwargs=of(call.kwargs))


def _one_a_sample(values: list[Any], size: int) -> bool:
    """Whether a list of tensors holds a sample each (Z-Image), and not a tensor of all samples
    each.
    """
    tensors = all(isinstance(v, Tensor) for v in values)
    return tensors and not all(v.ndim and len(v) == size for v in values)


def first_bad(model: nn.Module, again: Callable[[], object]) -> str:
    """Name of the first module (in order of execution, innermost first) whose output is not finite
    though its inputs are, when `again` runs the model.
    """
    found: list[str] = []

    def finite(x: Any) -> bool:
        if isinstance(x, Tensor):
            return bool(torch.isfinite(x).all()) if x.is_floating_point() else True
        values = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
        return all(finite(v) for v in values)

    def listen(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and finite(args) and finite(kwargs) and not finite(output):
                found.append(f"{name} ({type(module).__name__})")

        return after

    handles = [
        m.register_forward_hook(listen(name or "the denoiser itself"), with_kwargs=True)
        for name, m in model.named_modules()
        if not isinstance(m, Components)
    ]
    try:
        with torch.no_grad(), measuring(model):
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "none: its inputs are not finite"
