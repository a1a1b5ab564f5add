"""Structural similarity of the pictures to those of full precision: content in place (torchmetrics' SSIM)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..clean import Clean
from ..evaluation import Outcome

higher_is_better = True
title = "SSIM of the pictures"
label = "SSIM"
link = "loss_db"
needs_video = False
needs_pictures = True
#: pixels of a window's side for `features`; a plain window in place of SSIM's Gaussian one of about that width
WINDOW = 8
_C1, _C2 = 0.01**2, 0.03**2  # SSIM's own constants, for pictures in [0, 1]


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """SSIM a sample [N] in [-1, 1], on pictures scaled to [0, 1]; of a video the mean over its frames."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    own, given = (frames(x.pictures) / 2 + 0.5 for x in (reference, outcome))
    value = ssim(given, own, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(outcome.pictures), -1).mean(1)


def features(made: Clean, reference: Clean) -> tuple[Tensor, Tensor]:
    """Windows of the pictures, centred and divided by their contrast, and their means: the squared distance is 1 - SSIM to second order.

    With e the difference and windows of the reference of mean m and variance s^2, 1 - SSIM is var(e) / (2 s^2 + C2) + mean(e)^2 / (2 m^2 + C1) for
    small e (Wang et al. 2004, eq. 13, expanded around equality), averaged over windows and channels.
    """
    count = len(made.pictures)
    own, given = _windows(frames(reference.pictures.detach())), _windows(frames(made.pictures))
    mean, variance = own.mean(-1, keepdim=True), own.var(-1, keepdim=True, unbiased=False)
    centre = given.mean(-1, keepdim=True)
    contrast = (given - centre) / (2 * variance + _C2).sqrt() / WINDOW
    brightness = centre / (2 * mean.square() + _C1).sqrt()
    values = torch.cat([contrast, brightness], -1).reshape(count, -1)
    windows = float(own[..., 0].numel() // count)
    return values, torch.full((count,), windows, dtype=torch.float64, device=values.device)


def frames(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] as they are; the frames of videos [N, T, 3, H, W] as pictures [N * T, 3, H, W]."""
    return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures


def _windows(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> windows in [0, 1] [N, 3, rows, columns, WINDOW^2], half a window apart."""
    patches = (pictures / 2 + 0.5).unfold(2, WINDOW, WINDOW // 2).unfold(3, WINDOW, WINDOW // 2)
    return patches.flatten(4)
