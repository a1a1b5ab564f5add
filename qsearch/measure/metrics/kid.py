"""KID: maximum mean discrepancy between Inception's features of the pictures and of real ones, or
of full precision (torchmetrics).
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from ..evaluation import Outcome
from ..inception import NEEDS, Passed, embed_pictures
from ..pipelines import Prompts
from ..sets import compared_features

higher_is_better = False
title = "KID, times 1000"
label = "KID"
digits = 2
needs_video = False
needs_pictures = True
needs_weights = True
#: pictures a subset, and number of subsets (Binkowski et al. 2018 take 100 subsets of 1,000)
SUBSET, SUBSETS = 1000, 100


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where torch-fidelity or the weights are missing."""
    NEEDS.check()


def embed(pictures: Tensor) -> Tensor:
    """Inception's 2,048 features of each picture [N, 2048]."""
    return embed_pictures("kid", pictures)


def distance(made: Tensor, real: Tensor) -> float:
    """1000 times the unbiased MMD with a cubic kernel; one subset of all where there are fewer than
    `SUBSET` (it has no bias at any number).
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET, len(made), len(real))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features in memory
        metric = KernelInceptionDistance(
            Passed(made.shape[1]), subsets=1 if size < SUBSET else SUBSETS, subset_size=size
        )
    metric.update(real, real=True)
    metric.update(made, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # it draws its subsets from torch's own generator
        return 1000 * float(metric.compute()[0])


def measure(outcome: Outcome, reference: Outcome) -> float:
    """One number for all samples; against `reference.real` where there is a folder of real
    pictures, else against full precision's.
    """
    return distance(embed(outcome.pictures), compared_features(sys.modules[__name__], reference))
