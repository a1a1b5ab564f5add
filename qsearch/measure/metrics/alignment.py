"""Does the picture show what the caption says: the judge's reading of the zoo's scenes, CLIP's
directions for all other pictures.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ...zoo import judge
from ..clean import Clean
from ..clip import clip_folder, directions, load_clip
from ..evaluation import Outcome
from ..pipelines import Prompts

higher_is_better = True
title = "alignment with the caption"
label = "alignment"
link = "loss_db"
needs_video = False
needs_pictures = True
#: pictures of the zoo's world
SCENES = (3, 64, 64)
_NO_CAPTIONS = "alignment needs captions of the zoo's scenes; these prompts are free text, leave the metric out"


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse free text for the zoo's scenes, and other pictures where no CLIP is named."""
    if shape is None:
        return
    if tuple(shape) == SCENES and not prompts.captions:
        raise QSearchError(_NO_CAPTIONS)
    if tuple(shape) != SCENES:
        clip_folder()


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Share of the caption's attributes that the judge finds [N]; with CLIP, the cosine between
    picture and text, at least 0 (CLIPScore over 100).

    Raises `QSearchError` for scenes without their captions.
    """
    if outcome.pictures.shape[1:] != SCENES:
        clip = load_clip(outcome.pictures.device)
        with torch.no_grad():
            seen = directions(clip, outcome.pictures)
            return (seen * clip.texts(outcome.prompts.texts)).sum(-1).clamp(min=0)
    if not outcome.prompts.captions:
        raise QSearchError(_NO_CAPTIONS)
    return judge.alignment(judge.load_judge(), outcome.pictures, outcome.prompts.captions)


def features(made: Clean, reference: Clean) -> tuple[Tensor, Tensor]:
    """What the judge reads, as square roots of its heads' probabilities: the squared distance over
    the number of answers is twice Hellinger's.

    With CLIP, the pictures' directions: half their squared distance is 1 - cosine.
    """
    pictures = made.pictures
    if pictures.shape[1:] != SCENES:
        return directions(load_clip(pictures.device), pictures), torch.full(
            (len(pictures),), 2.0, dtype=torch.float64, device=pictures.device
        )
    read = _judge(pictures.device)(pictures)
    roots = [
        torch.softmax(logits, -1).clamp(min=1e-12).sqrt().flatten(1) for logits in read.values()
    ]
    answers = sum(logits[0, ..., 0].numel() for logits in read.values())
    return torch.cat(roots, 1), torch.full(
        (len(pictures),), float(answers), dtype=torch.float64, device=pictures.device
    )


@cache
def _judge(device: torch.device) -> judge.Judge:
    return judge.load_judge().to(device)
