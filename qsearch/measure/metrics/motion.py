"""Do things move as the caption says: direction, speed, entering and leaving, read by the judge of
the zoo's clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ...zoo import video_judge
from ...zoo.moving_scenes import OF_MOTION
from ..evaluation import Outcome
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0
from .alignment import clip_judge, read_roots

higher_is_better = True
title = "motion as the caption says"
label = "motion"
link = "loss_db"
needs_video = True
needs_pictures = True
needs_scenes = True


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse prompts that say nothing of how things move."""
    if not any(w in OF_MOTION for c in prompts.captions for w, _, _ in c.named):
        raise QSearchError(
            "motion needs captions of the zoo's moving scenes; these prompts name no motion that "
            "its judge reads: leave motion out"
        )


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Share of what each caption says of motion that the judge finds in the clip [N].

    Raises:
        QSearchError: pictures instead of clips, or no caption of moving scenes.
    """
    check(None, outcome.prompts)
    clips = video_judge.as_clips(outcome.pictures)
    hits = video_judge.clip_hits(video_judge.load_video_judge(), clips, outcome.prompts.captions)
    found = [[hit for w in OF_MOTION for hit in of_clip.get(w, [])] for of_clip in hits]
    return torch.tensor([sum(f) / len(f) if f else 1.0 for f in found])


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """Square roots of the probabilities of the judge's answers about motion: the squared distance
    over the number of answers is twice Hellinger's.
    """
    read = clip_judge(made.pictures.device)(video_judge.as_clips(made.pictures))
    return read_roots({k: v for k, v in read.items() if k in OF_MOTION})
