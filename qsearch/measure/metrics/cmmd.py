"""CMMD: maximum mean discrepancy between CLIP's directions of the pictures and of real ones, or of
full precision (Jayasumana et al. 2024).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..clip import clip_folder, directions, load_clip
from ..evaluation import Outcome
from ..pipelines import Prompts
from ..sets import compared_features

higher_is_better = False
title = "CMMD"
needs_video = False
needs_pictures = True
needs_weights = True
#: width of the Gaussian kernel and factor of the published numbers (section 4 of the paper)
SIGMA, FACTOR = 10.0, 1000.0
_BATCH = 32


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where no CLIP is named; the paper's is openai/clip-vit-large-patch14-336."""
    clip_folder("cmmd")


@torch.no_grad()
def embed(pictures: Tensor) -> Tensor:
    """CLIP's directions of each picture [N, D], of length 1."""
    clip = load_clip(pictures.device, "cmmd")
    return torch.cat([directions(clip, part).cpu() for part in pictures.split(_BATCH)])


def distance(made: Tensor, real: Tensor) -> float:
    """Squared MMD with a Gaussian kernel, of sets of directions [N, D] and [M, D], times `FACTOR`
    (eq. 4, the biased estimate).
    """
    made, real = made.double(), real.double()

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-torch.cdist(a, b).square() / (2 * SIGMA**2)).mean())

    return FACTOR * (mean(made, made) + mean(real, real) - 2 * mean(made, real))


def measure(outcome: Outcome, reference: Outcome) -> float:
    """One number for all samples; against `reference.real` where there is a folder of real
    pictures, else against full precision's.
    """
    return distance(embed(outcome.pictures), compared_features(sys.modules[__name__], reference))
