"""CLIP score: 100 times the cosine between a picture and its prompt, at least 0 (Hessel et al.
2021, as torchmetrics scales it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ..clip import clip_folder, directions, load_clip
from ..evaluation import Outcome
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "CLIP score"
digits = 2
needs_video = False
needs_pictures = True
needs_weights = True


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where no CLIP is named, and pictures that were made without a text."""
    clip_folder("clip_score")
    if not any(prompts.texts):
        raise QSearchError("clip_score compares pictures with their prompts; these have none")


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Score a sample [N] between 0 and 100; of a video, by the mean direction of its frames. Needs
    QSEARCH_CLIP, a CLIPModel's folder.
    """
    check(tuple(outcome.pictures.shape[1:]), outcome.prompts)
    clip = load_clip(outcome.pictures.device, "clip_score")
    with torch.no_grad():
        seen = directions(clip, outcome.pictures)
        return 100 * (seen * clip.texts(outcome.prompts.texts)).sum(-1).clamp(min=0)


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """Directions of the pictures: half their squared distance is 1 - cosine."""
    pictures = made.pictures
    return directions(load_clip(pictures.device, "clip_score"), pictures), torch.full(
        (len(pictures),), 2.0, dtype=torch.float64, device=pictures.device
    )
