"""HPSv2.1: how well people like a picture for its prompt, learnt from their choices (Wu et al.
2023; imscore's port of the model).
"""

from __future__ import annotations

from torch import Tensor

from ..evaluation import Outcome
from ..networks import Needs
from ..pipelines import Prompts
from ..rewards import check_texts, scores

higher_is_better = True
title = "HPSv2.1"
digits = 2
needs_video = False
needs_pictures = True
needs_weights = True
NEEDS = Needs("hps", ("imscore", "torchvision"), "HPSv2.1's weights (3.9 GB)", "RE-N-Y/hpsv21")


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where imscore is missing, and pictures that were made without a text."""
    NEEDS.check()
    check_texts("hps", prompts)


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """100 times the score a sample [N], as papers print it; of a video the mean over its frames."""
    return 100 * scores("imscore.hps.model", "HPSv2", NEEDS, outcome)
