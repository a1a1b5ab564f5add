"""Signal to quantization-noise ratio of the final latents, in dB: quality, with no judge in
between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation import Outcome
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "SQNR of the final latent"
label = "latent SQNR"
unit = "dB"
digits = 1
against_size = True
needs_video = False
needs_pictures = False
#: samples that are identical would have an infinite ratio; this is the ratio at fp32's own
#: precision
CEILING = 140.0


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """dB a sample [N]: 10 log10(sum of squares / sum of squared differences), at most `CEILING`."""
    error = (outcome.latents - reference.latents).double().flatten(1).square().sum(1)
    power = reference.latents.double().flatten(1).square().sum(1)
    return (10 * torch.log10(power / error.clamp(min=1e-300))).clamp(max=CEILING).float()


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """The latents themselves: squared distances over the squared latents are noise powers, whose
    SQNR is -10 log10.
    """
    return made.latents.flatten(1), reference.latents.double().flatten(1).square().sum(1)
