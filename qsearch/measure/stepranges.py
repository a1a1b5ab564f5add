"""Step ranges: calibrations of their own for parts of the sampler, and which of them a call of the denoiser belongs to.

ViDiT-Q (arXiv 2406.02540) balances channels anew for each range of timesteps. A call is told by the timestep that it is given, and belongs to
the range that was calibrated nearest to it: so the same holds for recorded calls, for any number of sampler steps, and while sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import QSearchError
from .calibration import LayerInputs
from .pipelines import Call

_ARGUMENT = "timestep"  # of every denoiser in diffusers


@dataclass(frozen=True)
class StepRanges:
    """`times`: the timesteps that each range was calibrated on. `parts`: layer -> inputs in that range."""

    times: tuple[tuple[float, ...], ...]
    parts: tuple[Mapping[str, LayerInputs], ...]

    def place(self, time: float) -> int:
        """The range with the calibrated timestep nearest to `time`."""
        return min(range(len(self.times)), key=lambda i: min(abs(t - time) for t in self.times[i]))


def time_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The timestep of a call, of a batch its mean. Raises `QSearchError` for a denoiser that is not told one."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    time = given.get(_ARGUMENT, given.get("kwargs", {}).get(_ARGUMENT))
    if time is None:
        raise QSearchError(
            f"ranges of steps go by the argument {_ARGUMENT!r} of the denoiser; {type(model).__name__} was called with {', '.join(given)}"
        )
    return float(torch.as_tensor(time).double().mean())


def cut(model: nn.Module, calls: Sequence[Call], count: int) -> list[list[Call]]:
    """`calls` in `count` parts of the sampler, by timestep, with about as many different timesteps each. Raises `QSearchError` for too few of them."""
    timed = [(time_of(model, call.args, call.kwargs), call) for call in calls]
    times = sorted({time for time, _ in timed}, reverse=True)
    if len(times) < count:
        raise QSearchError(
            f"{count} ranges of steps need calls of as many steps to be calibrated on; these are of {len(times)}, record more bins"
        )
    place = {time: i * count // len(times) for i, time in enumerate(times)}
    return [[call for time, call in timed if place[time] == part] for part in range(count)]
