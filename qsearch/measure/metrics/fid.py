"""FID: Fréchet distance of Inception's features of the pictures to those of real ones, or of full
precision (torchmetrics, torch-fidelity).
"""

from __future__ import annotations

import sys

from torch import Tensor

from ..evaluation import Outcome
from ..inception import NEEDS, Passed, embed_pictures
from ..pipelines import Prompts
from ..sets import compared_features

higher_is_better = False
title = "FID"
digits = 2
needs_video = False
needs_pictures = True
needs_weights = True
#: fewer pictures than features leave a covariance without an inverse; papers take 5,000 or more
FEW = 2048


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where torch-fidelity or the weights are missing."""
    NEEDS.check()


def warn(count: int) -> str:
    """What is to be said of a number of pictures that is too small for an FID to mean anything; ""
    for enough.
    """
    return (
        f"fid of {count} pictures is biased upwards and compares with no paper's: {FEW} are needed "
        "for a covariance of 2,048 features, kid means something from about 100 on"
        if count < FEW
        else ""
    )


def embed(pictures: Tensor) -> Tensor:
    """Inception's 2,048 features of each picture [N, 2048]."""
    return embed_pictures("fid", pictures)


def distance(made: Tensor, real: Tensor) -> float:
    """Fréchet distance between two sets of features [N, D] and [M, D], of two pictures each at
    least (Heusel et al. 2017, eq. 6).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Passed(made.shape[1])).set_dtype(made.dtype)
    metric.update(real, real=True)
    metric.update(made, real=False)
    return float(metric.compute())


def measure(outcome: Outcome, reference: Outcome) -> float:
    """One number for all samples; against `reference.real` where there is a folder of real
    pictures, else against full precision's.
    """
    return distance(embed(outcome.pictures), compared_features(sys.modules[__name__], reference))
