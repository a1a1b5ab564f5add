"""Trajectory: the whole sampler as one differentiable function, through the pipeline's own loop, so
that what reaches the final picture is priced.

`type(pipe).__call__.__wrapped__` is a pipeline's call without its `torch.no_grad`. The denoiser's
forward is recomputed in the backward (`torch.utils.checkpoint`), so only the latents between steps
are kept. The reentrant kind of checkpoint is wanted here: each step's recomputation has a backward
of its own, so a weight's gradient appears step by step and can be contracted and freed, and each
step's share is known; the other kind would add the steps up first.

Where text encoders are components of the model, gradients go on from the embeddings that the
denoiser is given into their weights; where a VAE is, from the decoded pictures through it to the
latents. Both run once, and keep what they need for the backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree, checkpoint

from ..core.errors import QSearchError
from ..core.steps import StepClock, clock_of
from ..graphs.components import Components, parts_of
from . import calling
from .calling import arguments
from .calls import Call, measuring, patched, repeated
from .components import model_of
from .decoding import decode_batch, latent_channels
from .observation import AbstractObservation, compared, first_bad, measured
from .predicted_x0 import PredictedX0
from .prompts import Prompts
from .recording import first_call
from .sampling import Sampling


@dataclass(frozen=True)
class Trajectory:
    """Some of the samples of a seed, from noise to final latents; `first`: number of the first one,
    which its noise depends on.
    """

    pipe: Any
    prompts: Prompts
    sampling: Sampling
    first: int = 0

    def observed(self, model: nn.Module, metrics: Sequence[str]) -> AbstractObservation:
        """The trajectory as an observation of `model`: the pipeline's denoiser, or `model_of` some
        of its components.
        """
        names = tuple(model.parts) if isinstance(model, Components) else ()
        if model is not model_of(self.pipe, names):
            raise QSearchError(
                "trajectories belong to the denoiser of their pipeline; "
                f"{type(model).__name__} is not that of {type(self.pipe).__name__}"
            )
        return TrajectoryObservation(self, model, metrics)


def trajectories(
    pipe: Any, prompts: Prompts, sampling: Sampling, batch: int = 1
) -> list[Trajectory]:
    """The samples in parts of `batch`; each part has probes of its own."""
    return [
        Trajectory(pipe, prompts[i : i + batch], sampling, i) for i in range(0, len(prompts), batch)
    ]


class TrajectoryObservation(AbstractObservation):
    """Features of the final latents. Make it while the model is in full precision."""

    def __init__(self, trajectory: Trajectory, model: nn.Module, metrics: Sequence[str]) -> None:
        self.trajectory, self.metrics = trajectory, tuple(metrics)
        self.whole, self.model = model, model_of(trajectory.pipe)
        self.bin, self.now = 0, 0

    @property
    def components(self) -> tuple[str, ...]:
        """All of the model's: each of them runs."""
        return tuple(parts_of(self.whole))

    @cached_property
    def _latents(self) -> Tensor:
        self._count = StepCount(clock_of(self.model))
        with torch.no_grad(), patched_parts(self.model, self._count.counted):
            latents = _sampled(self.trajectory)
        again = partial(_sampled, self.trajectory)
        if not torch.isfinite(latents).all():
            first = first_bad(self.model, again)
            raise QSearchError(
                f"{type(self.trajectory.pipe).__name__} made latents that are not finite; "
                f"the first layer to make such numbers is {first}"
            )
        if self.trajectory.first == 0:
            with torch.no_grad():
                repeated(self.model, again, latents)
        return latents

    def example(self) -> Call:
        """The first call of the denoiser."""
        t, named = self.trajectory, isinstance(self.whole, Components)
        return first_call(t.pipe, t.prompts, t.sampling, named=named)

    @property
    def sampler_steps(self) -> int:
        """Those that call the denoiser: all of the sampler's, or where it starts in the middle the
        rest of them.
        """
        _ = self._latents
        return len(self._count.places)

    def _clean(self, latents: Tensor) -> PredictedX0:
        pipe = self.trajectory.pipe
        t = self.trajectory
        decoder = partial(decode_batch, pipe, sampling=t.sampling, prompts=t.prompts)
        return PredictedX0(latents, decoder, latent_channels(pipe))

    @cached_property
    def _own(self) -> PredictedX0:
        return self._clean(self._latents)

    @cached_property
    def _measured(self) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return measured(self.metrics, None, self._own, None, self._own)

    def features(self) -> dict[str, Tensor]:
        """Features of the model as it is now; with gradients, the sampler is kept as latents
        between steps.
        """
        _ = self._measured  # in full precision, if this is the first call
        if not torch.is_grad_enabled():
            latents = _sampled(self.trajectory)
        else:
            latents = self._differentiable()
        made = measured(self.metrics, None, self._clean(latents), None, self._own)
        found = {name: features for name, (features, _) in made.items()}
        for features in found.values():
            if features.requires_grad:  # a backward meets a VAE first, after the last step
                features.register_hook(self._at_the_end)
        return found

    def _at_the_end(self, _: Tensor) -> None:
        self.now = self.sampler_steps - 1

    def _differentiable(self) -> Tensor:
        clock, number = clock_of(self.model), 0

        def recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal number
            at = (clock.step, clock.total) if clock.known else (number, 0)
            number += 1
            return _checkpointed(partial(self._at, at, forward), args, kwargs)

        with patched_parts(self.model, recomputed):
            latents = _sampled(self.trajectory)
        if not latents.requires_grad:
            name = type(getattr(self.trajectory.pipe, "scheduler", None)).__name__
            raise QSearchError(
                f"{name} gives no gradient through its steps, so a trajectory can't be "
                "probed; use one that does, or probe step by step"
            )
        return latents

    def _at(self, at: tuple[int, int], forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of a call of one sampler step, which the clock shows again while it is
        recomputed.
        """
        self.now = self._count.places[at[0]]
        with ExitStack() as stack:
            if at[1]:
                stack.enter_context(clock_of(self.model).at(*at))
            stack.enter_context(measuring(self.model))
            return forward(*args, **kwargs)

    def floor(self) -> dict[str, float]:
        """Each metric when the samples run in a batch of another size."""
        own = self.trajectory.prompts
        twice = Prompts(own.texts * 2, own.captions * 2, own.values * 2)
        more = replace(self.trajectory, prompts=twice)
        with torch.no_grad():
            latents = _sampled(more)[: len(self._latents)]
            return compared(
                measured(self.metrics, None, self._clean(latents), None, self._own), self
            )


class StepCount:
    """The sampler steps of which a model is called.

    Attributes:
        places: sampler step -> its number among those.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock, self.places, self._calls = clock, dict[int, int](), 0

    def counted(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a call and make it."""
        step = self.clock.step if self.clock.known else self._calls
        self._calls += 1
        self.places.setdefault(step, len(self.places))
        return forward(*args, **kwargs)


def _sampled(trajectory: Trajectory) -> Tensor:
    pipe = trajectory.pipe
    if inspect.unwrap(type(pipe).__call__) is type(pipe).__call__:
        raise QSearchError(
            f"the call of {type(pipe).__name__} is not wrapped in torch.no_grad as "
            "diffusers' pipelines are; probe step by step"
        )
    given = arguments(pipe, trajectory.prompts, trajectory.first, trajectory.sampling)
    return calling.call(pipe, given, gradients=True).float()


@contextmanager
def patched_parts(model: nn.Module, around: Any) -> Iterator[None]:
    """`model`, or each of several denoisers, calls `around(forward, ...)` in place of its
    forward.
    """
    with ExitStack() as stack:
        for part in parts_of(model).values():
            stack.enter_context(patched(part, around))
        yield


def _checkpointed(forward: Any, args: Any, kwargs: Any) -> Any:
    """`forward(*args, **kwargs)`, recomputed in the backward. The reentrant checkpoint sees tensors
    among its own arguments only.
    """
    leaves, spec = _pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    shape: list[Any] = []

    def flat(_: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        again, keywords = _pytree.tree_unflatten(filled, spec)
        made, form = _pytree.tree_flatten(forward(*again, **keywords))
        shape[:] = [form]
        return tuple(made)

    anchor = torch.zeros(
        (), requires_grad=True
    )  # the first step's latents want no gradient, its weights do
    made = checkpoint.checkpoint(flat, anchor, *(leaves[i] for i in places), use_reentrant=True)
    return _pytree.tree_unflatten(list(made), shape[0])
