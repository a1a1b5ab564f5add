"""Structural similarity over five scales, of the pictures to those of full precision (torchmetrics'
MS-SSIM).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import QSearchError
from ..evaluation import Outcome
from ..networks import a_sample, each_frame
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0
from .ssim import WINDOW, contrast_and_brightness

higher_is_better = True
title = "MS-SSIM of the pictures"
label = "MS-SSIM"
link = "loss_db"
needs_video = False
needs_pictures = True
#: weights of the scales, from the finest (Wang et al. 2003, section 3.2)
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: pixels of a side: Gaussian windows of 11 must fit into the coarsest of five scales
smallest = 11 * 2**4


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse pictures that are too small for five scales."""
    if shape is not None and min(shape[-2:]) < smallest:
        raise QSearchError(
            f"ms_ssim halves pictures four times, and takes them from {smallest} pixels a side on; "
            f"these are {'x'.join(map(str, shape))}: use ssim"
        )


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """MS-SSIM a sample [N], on pictures scaled to [0, 1]; of a video the mean over its frames."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    check(tuple(outcome.pictures.shape[1:]), outcome.prompts)
    own, given = (each_frame(x.pictures) / 2 + 0.5 for x in (reference, outcome))
    value = multiscale_structural_similarity_index_measure(
        given, own, data_range=1.0, reduction="none", betas=BETAS, normalize="relu"
    )
    return a_sample(value, len(outcome.pictures))


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """SSIM's windows at every scale, weighted by `BETAS`: the squared distance is 1 - MS-SSIM to
    second order.

    MS-SSIM is a product of contrasts at all scales and of brightness at the coarsest, each to the
    power of its weight, so that to first order in what is lost the weighted losses add up (Wang et
    al. 2003, eq. 7).
    """
    count = len(made.pictures)
    own, given = each_frame(reference.pictures.detach()), each_frame(made.pictures)
    parts = []
    for i, beta in enumerate(BETAS):
        contrast, brightness, windows = contrast_and_brightness(given, own)
        kept = [contrast, brightness] if i == len(BETAS) - 1 else [contrast]
        share = (beta / (windows / count)) ** 0.5
        parts += [share * part.reshape(count, -1) for part in kept]
        own, given = F.avg_pool2d(own, 2), F.avg_pool2d(given, 2)
        if min(own.shape[-2:]) < WINDOW:
            break
    values = torch.cat(parts, 1)
    return values, torch.ones(count, dtype=torch.float64, device=values.device)
