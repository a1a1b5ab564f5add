"""DISTS: structure and texture of the pictures against those of full precision, in VGG-16's
features (torchmetrics, Ding et al. 2020).
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
title = "DISTS of the pictures"
label = "DISTS"
needs_video = False
needs_pictures = True
needs_weights = True
NEEDS = Needs("dists", ("torchvision",), "VGG-16's weights (528 MB)", "vgg16-397923af.pth")
_BATCH = 8
_C1 = _C2 = 1e-6  # DISTS' own constants


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where torchvision or the weights are missing."""
    NEEDS.check()


@torch.no_grad()
def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """DISTS a sample [N], 0 for identical pictures scaled to [0, 1]; of a video the mean over its
    frames.
    """
    own, given = (each_frame(x.pictures) / 2 + 0.5 for x in (reference, outcome))
    net = network(given.device)
    found = [
        net(a, b).reshape(-1) for a, b in zip(given.split(_BATCH), own.split(_BATCH), strict=True)
    ]
    return a_sample(torch.cat(found), len(outcome.pictures))


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """Means and deviations of VGG's channels over those of full precision, with DISTS' weights: the
    squared distance is DISTS to second order.

    With d the difference of a channel, 1 - l is mean(d)^2 / (2 m^2 + c1) and 1 - s is var(d) / (2 v
    + c2) for small d (Ding et al. 2020, eqs. 4-6, expanded around equality).
    """
    pictures = made.pictures
    net = network(pictures.device)
    total = net.alpha.sum() + net.beta.sum()
    alphas = (net.alpha / total).clamp(min=0).split(net.chns, 1)
    betas = (net.beta / total).clamp(min=0).split(net.chns, 1)
    frames = len(each_frame(pictures)) / len(pictures)
    with torch.no_grad():
        own = net.forward_once(each_frame(reference.pictures.detach()) / 2 + 0.5)
    given = net.forward_once(each_frame(pictures) / 2 + 0.5)
    parts = []
    for layer, kept, alpha, beta in zip(given, own, alphas, betas, strict=True):
        m, v = kept.mean((2, 3), keepdim=True), kept.var((2, 3), keepdim=True, unbiased=False)
        mean = layer.mean((2, 3), keepdim=True)
        pixels = layer.shape[-2] * layer.shape[-1]
        parts.append(alpha.sqrt() * mean / (2 * m.square() + _C1).sqrt())
        parts.append((beta / pixels).sqrt() * (layer - mean) / (2 * v + _C2).sqrt())
    values = torch.cat([part.reshape(len(pictures), -1) for part in parts], 1)
    return values / frames**0.5, torch.ones(
        len(pictures), dtype=torch.float64, device=pictures.device
    )


@cache
def network(device: torch.device) -> Any:
    """torchmetrics' network of DISTS on a device. Raises `QSearchError` where it or its weights are
    missing.
    """
    with NEEDS.loading():
        from torchmetrics.functional.image.dists import DISTSNetwork

        return DISTSNetwork().requires_grad_(False).to(device)
