"""Signal to quantization-noise ratio of the decoded pictures, in dB: what `sqnr` is to latents, with the VAE in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..clean import Clean
from ..evaluation import Outcome
from .sqnr import CEILING

higher_is_better = True
title = "SQNR of the pictures"
label = "picture SQNR"
unit = "dB"
digits = 1
needs_video = False
needs_pictures = True


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """dB a sample [N]: 10 log10(sum of squares / sum of squared differences) of pixels in [-1, 1], at most `CEILING`."""
    error = (outcome.pictures - reference.pictures).double().flatten(1).square().sum(1)
    power = reference.pictures.double().flatten(1).square().sum(1)
    return (10 * torch.log10(power / error.clamp(min=1e-300))).clamp(max=CEILING).float()


def features(made: Clean, reference: Clean) -> tuple[Tensor, Tensor]:
    """The pictures themselves: squared distances over the squared pixels are noise powers, whose SQNR is -10 log10."""
    return made.pictures.flatten(1), reference.pictures.double().flatten(1).square().sum(1)
