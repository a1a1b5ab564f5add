"""LPIPS: how far the pictures lie from those of full precision in AlexNet's features (torchmetrics'
LPIPS, Zhang et al. 2018).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..evaluation import Outcome
from ..networks import Needs, a_sample, each_frame
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0

higher_is_better = False
title = "LPIPS of the pictures"
label = "LPIPS"
needs_video = False
needs_pictures = True
needs_weights = True
NEEDS = Needs("lpips", ("torchvision",), "AlexNet's weights (233 MB)", "alexnet-owt-7be5be79.pth")
_BATCH = 16
_TINY = 1e-10  # what LPIPS adds to the norm of a pixel's features


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where torchvision or the weights are missing."""
    NEEDS.check()


@torch.no_grad()
def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """LPIPS (AlexNet) a sample [N], 0 for identical pictures; of a video the mean over its
    frames.
    """
    own, given = (each_frame(x.pictures) for x in (reference, outcome))
    net = network(given.device)
    found = [
        net(a, b).flatten() for a, b in zip(given.split(_BATCH), own.split(_BATCH), strict=True)
    ]
    return a_sample(torch.cat(found), len(outcome.pictures))


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """AlexNet's features, of length 1 at each pixel, times the roots of LPIPS' weights: their
    squared distance is LPIPS (eq. 1).
    """
    pictures = made.pictures
    frames = each_frame(pictures)
    net = network(pictures.device)
    parts = []
    for layer, weigh in zip(net.net(net.scaling_layer(frames)), net.lins, strict=True):
        weight = weigh.model[-1].weight.clamp(min=0).sqrt()  # [1, C, 1, 1], none is negative
        length = layer.square().sum(1, keepdim=True).add(_TINY**2).sqrt()
        pixels = layer.shape[-2] * layer.shape[-1] * len(frames) / len(pictures)
        parts.append((layer / (length + _TINY) * weight).reshape(len(pictures), -1) / pixels**0.5)
    return torch.cat(parts, 1), torch.ones(
        len(pictures), dtype=torch.float64, device=pictures.device
    )


@cache
def network(device: torch.device) -> Any:
    """torchmetrics' network of LPIPS on a device. Raises `QSearchError` where it or its weights are
    missing.
    """
    with NEEDS.loading():
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity("alex").net.to(device)
