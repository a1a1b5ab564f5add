"""How a video moves: differences between neighbouring frames of its clean latents, whatever stands
still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ..evaluation import Outcome
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "SQNR of the differences between frames"
label = "frame differences"
unit = "dB"
digits = 1
needs_video = True
needs_pictures = False
#: as of the metric sqnr
CEILING = 140.0


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """dB a sample [N]: squared differences of neighbouring frames over the squared error of these
    differences, at most `CEILING`.
    """
    own, given = (differences(x.latents, outcome.channels) for x in (reference, outcome))
    error = (given - own).double().square().sum(1)
    return (
        (10 * torch.log10(own.double().square().sum(1) / error.clamp(min=1e-300)))
        .clamp(max=CEILING)
        .float()
    )


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """The differences, over their squares in full precision. Raises `QSearchError` for pictures,
    and for a video that stands still.
    """
    scale = differences(reference.latents, reference.channels).double().square().sum(1)
    if not scale.all():
        raise QSearchError(
            "temporal compares how frames differ; this video stands still, leave temporal out"
        )
    return differences(made.latents, made.channels), scale


def differences(latents: Tensor, channels: int) -> Tensor:
    """What changes from each frame to the next [N, F], of latents [N, C, T, h, w] or [N, T, C, h,
    w]; `channels` tells which (C first, where both fit).
    """
    if latents.ndim != 5 or channels not in latents.shape[1:3]:
        shape = " x ".join(map(str, latents.shape))
        raise QSearchError(
            "temporal needs a video's latents, [N, C, T, h, w] or [N, T, C, h, w] with "
            f"{channels} channels; given {shape}: leave temporal out"
        )
    return latents.diff(dim=2 if latents.shape[1] == channels else 1).flatten(1)
