"""ImageReward: a reward learnt from people's rankings of pictures for a prompt (Xu et al. 2023;
imscore's port of the model).
"""

from __future__ import annotations

from torch import Tensor

from ..evaluation import Outcome
from ..networks import Needs
from ..pipelines import Prompts
from ..rewards import check_texts, scores

higher_is_better = True
title = "ImageReward"
needs_video = False
needs_pictures = True
needs_weights = True
NEEDS = Needs(
    "image_reward",
    ("imscore", "torchvision"),
    "ImageReward's weights (1.8 GB)",
    "RE-N-Y/ImageReward",
)


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where imscore is missing, and pictures that were made without a text."""
    NEEDS.check()
    check_texts("image_reward", prompts)


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Reward a sample [N], about normal over people's pictures; of a video the mean over its
    frames.
    """
    return scores("imscore.imreward.model", "ImageReward", NEEDS, outcome)
