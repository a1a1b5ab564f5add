"""simulate_steps(pipe, plan): each sampler step computes by the plan of its bin; weights are exchanged where one bin ends and the next begins."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.stepplan import StepPlan
from .pipelines import denoiser_of
from .simulation import QuantizedWeights, simulate


@contextmanager
def simulate_steps(
    pipe: Any, plan: StepPlan, graph: OpGraph, weights: QuantizedWeights | None = None
) -> Iterator[Any]:
    """The pipeline's denoiser computes as `plan` says inside the block: of n sampler steps, step i by bin i * bins // n, the noisiest first.

    Steps are counted by the scheduler's `step`, from each `set_timesteps` on, so a call with several passes of the denoiser a step is counted
    rightly. Raises `QSearchError` for a pipeline without a scheduler, and for fewer steps than bins.
    """
    model, scheduler = denoiser_of(pipe), getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise QSearchError(
            f"a step-wise plan goes by the scheduler's steps; {type(pipe).__name__} has no scheduler"
        )
    weights = weights or QuantizedWeights(model, graph)
    asked = (
        torch.is_grad_enabled()
    )  # `simulate` is entered within the pipeline's own no_grad and left outside of it
    with ExitStack() as after, ExitStack() as inside:
        after.callback(torch.set_grad_enabled, asked)
        step, current = 0, -1

        def start(own: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal step
            step = 0
            return own(*args, **kwargs)

        def advance(own: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal step
            step += 1
            return own(*args, **kwargs)

        def choose(_: nn.Module, args: Any) -> None:
            nonlocal current
            count = len(scheduler.timesteps)
            if count < len(plan.bins):
                raise QSearchError(
                    f"a plan for {len(plan.bins)} bins of steps needs as many sampler steps at least; given {count}"
                )
            wanted = min(step, count - 1) * len(plan.bins) // count
            if wanted != current:
                inside.close()
                inside.enter_context(simulate(model, plan.bins[wanted], graph, weights))
                current = wanted

        with _around(scheduler, "set_timesteps", start), _around(scheduler, "step", advance):
            handle = model.register_forward_pre_hook(choose)
            try:
                yield pipe
            finally:
                handle.remove()


@contextmanager
def _around(thing: Any, name: str, wrapper: Any) -> Iterator[None]:
    own = getattr(thing, name)
    setattr(thing, name, functools.wraps(own)(functools.partial(wrapper, own)))
    try:
        yield
    finally:
        delattr(thing, name)
