"""Peak signal-to-noise ratio of the pictures to those of full precision (torchmetrics' PSNR), in
dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation import Outcome
from ..networks import a_sample, each_frame
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "PSNR of the pictures"
label = "PSNR"
unit = "dB"
digits = 1
needs_video = False
needs_pictures = True
#: identical pictures have an infinite ratio; this stands for it (bytes that differ in one pixel of
#: 1024x1024 by one have 113 dB)
CEILING = 120.0
_RANGE = 2.0  # of pictures in [-1, 1]


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """dB a sample [N]: 10 log10(range^2 / mean squared error), at most `CEILING`; of a video the
    mean over its frames.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    own, given = (each_frame(x.pictures) for x in (reference, outcome))
    value = peak_signal_noise_ratio(
        given, own, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3)
    )
    return a_sample(value.clamp(max=CEILING), len(outcome.pictures))


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """The pixels: squared distances over range^2 and number of pixels, of which PSNR is -10
    log10.
    """
    pictures = made.pictures
    scale = float(reference.pictures[0].numel()) * _RANGE**2
    count = len(pictures)
    return pictures.flatten(1), torch.full(
        (count,), scale, dtype=torch.float64, device=pictures.device
    )
