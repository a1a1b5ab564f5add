"""Structural similarity of the pictures to those of full precision: content in place (torchmetrics'
SSIM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation import Outcome
from ..networks import a_sample, each_frame
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "SSIM of the pictures"
label = "SSIM"
link = "loss_db"
needs_video = False
needs_pictures = True
#: pixels of a window's side for `features`; a plain window in place of SSIM's Gaussian one of about
#: that width
WINDOW = 8
_C1, _C2 = 0.01**2, 0.03**2  # SSIM's own constants, for pictures in [0, 1]


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """SSIM a sample [N] in [-1, 1], on pictures scaled to [0, 1]; of a video the mean over its
    frames.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    own, given = (each_frame(x.pictures) / 2 + 0.5 for x in (reference, outcome))
    value = ssim(given, own, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return a_sample(value, len(outcome.pictures))


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """Windows of the pictures, centred and divided by their contrast, and their means: the squared
    distance is 1 - SSIM to second order.

    With e the difference and windows of the reference of mean m and variance s^2, 1 - SSIM is
    var(e) / (2 s^2 + C2) + mean(e)^2 / (2 m^2 + C1) for small e (Wang et al. 2004, eq. 13, expanded
    around equality), averaged over windows and channels.
    """
    count = len(made.pictures)
    own, given = each_frame(reference.pictures.detach()), each_frame(made.pictures)
    contrast, brightness, windows = contrast_and_brightness(given, own)
    values = torch.cat([contrast, brightness], -1).reshape(count, -1)
    return values, torch.full((count,), windows / count, dtype=torch.float64, device=values.device)


def contrast_and_brightness(given: Tensor, own: Tensor) -> tuple[Tensor, Tensor, float]:
    """Windows of `given` [N, 3, H, W] over the contrast of `own`'s, their means over its
    brightness, and the number of windows.
    """
    own, given = _windows(own), _windows(given)
    mean, variance = own.mean(-1, keepdim=True), own.var(-1, keepdim=True, unbiased=False)
    centre = given.mean(-1, keepdim=True)
    contrast = (given - centre) / (2 * variance + _C2).sqrt() / WINDOW
    brightness = centre / (2 * mean.square() + _C1).sqrt()
    return contrast, brightness, float(own[..., 0].numel())


def _windows(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> windows in [0, 1] [N, 3, rows, columns, WINDOW^2], half a
    window apart.
    """
    patches = (pictures / 2 + 0.5).unfold(2, WINDOW, WINDOW // 2).unfold(3, WINDOW, WINDOW // 2)
    return patches.flatten(4)
