"""CLIP-IQA: does a picture look more like "Good photo." than like "Bad photo." to CLIP (Wang et al.
2022, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clip import Clip, clip_folder, directions, load_clip
from ..evaluation import Outcome
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "CLIP-IQA"
needs_video = False
needs_pictures = True
needs_weights = True
#: the antonyms of the paper's "quality"
PAIR = ("Good photo.", "Bad photo.")


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where no CLIP is named."""
    clip_folder("clip_iqa")


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Probability of "Good photo." a sample [N]. Needs QSEARCH_CLIP, a CLIPModel's folder."""
    clip = load_clip(outcome.pictures.device, "clip_iqa")
    with torch.no_grad():
        return _probabilities(clip, outcome.pictures)[:, 0]


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """Square roots of both probabilities: the squared distance is twice Hellinger's."""
    pictures = made.pictures
    roots = _probabilities(load_clip(pictures.device, "clip_iqa"), pictures).clamp(min=1e-12).sqrt()
    return roots, torch.full((len(pictures),), 2.0, dtype=torch.float64, device=pictures.device)


def _probabilities(clip: Clip, pictures: Tensor) -> Tensor:
    """[N, 2]: softmax over the cosines with `PAIR`, sharpened by CLIP's own temperature."""
    cosines = directions(clip, pictures) @ clip.texts(PAIR).T
    return torch.softmax(clip.model.logit_scale.exp() * cosines, -1)
