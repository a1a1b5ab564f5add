"""Does the picture show what the caption says: the judge's reading of the zoo's scenes, frame by
frame of its clips, CLIP's directions for all other pictures. How things move is `motion`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ...zoo import judge, video_judge
from ...zoo.moving_scenes import OF_MOTION
from ..clip import clip_folder, directions, load_clip
from ..evaluation import Outcome
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0

higher_is_better = True
title = "alignment with the caption"
label = "alignment"
link = "loss_db"
needs_video = False
needs_pictures = True
#: pictures of the zoo's world
SCENES = (3, 64, 64)
_NO_CAPTIONS = (
    "alignment needs captions of the zoo's scenes; these prompts are free text, leave the metric "
    "out"
)


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse free text for the zoo's scenes, and other pictures where no CLIP is named."""
    if shape is None:
        return
    if tuple(shape) == SCENES and not prompts.captions:
        raise QSearchError(_NO_CAPTIONS)
    if tuple(shape) != SCENES:
        clip_folder()


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Share of the caption's attributes that the judge finds [N], of clips the mean over their
    frames; with CLIP, the cosine between picture and text, at least 0 (CLIPScore over 100).

    Raises `QSearchError` for scenes without their captions.
    """
    if outcome.pictures.shape[-3:] != SCENES:
        clip = load_clip(outcome.pictures.device)
        with torch.no_grad():
            seen = directions(clip, outcome.pictures)
            return (seen * clip.texts(outcome.prompts.texts)).sum(-1).clamp(min=0)
    if not outcome.prompts.captions:
        raise QSearchError(_NO_CAPTIONS)
    captions = outcome.prompts.captions
    if outcome.pictures.ndim == 5:
        clips = video_judge.as_clips(outcome.pictures)
        return video_judge.frame_alignment(video_judge.load_video_judge(), clips, captions).mean(1)
    return judge.alignment(judge.load_judge(), outcome.pictures, captions)


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """What the judge reads, as square roots of its heads' probabilities: the squared distance over
    the number of answers is twice Hellinger's.

    With CLIP, the pictures' directions: half their squared distance is 1 - cosine.
    """
    pictures = made.pictures
    if pictures.shape[-3:] != SCENES:
        return directions(load_clip(pictures.device), pictures), torch.full(
            (len(pictures),), 2.0, dtype=torch.float64, device=pictures.device
        )
    if pictures.ndim == 5:
        read = clip_judge(pictures.device)(video_judge.as_clips(pictures))
        return read_roots({k: v for k, v in read.items() if k not in (*OF_MOTION, "places")})
    return read_roots(picture_judge(pictures.device)(pictures))


def read_roots(read: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Square roots of the probabilities of a judge's heads [N, F], and the number of answers
    [N].
    """
    roots = [
        torch.softmax(logits, -1).clamp(min=1e-12).sqrt().flatten(1) for logits in read.values()
    ]
    answers = sum(logits[0, ..., 0].numel() for logits in read.values())
    return torch.cat(roots, 1), torch.full(
        (len(roots[0]),), float(answers), dtype=torch.float64, device=roots[0].device
    )


@cache
def clip_judge(device: torch.device) -> video_judge.VideoJudge:
    """The judge of the zoo's clips on a device, loaded once for all metrics that ask it."""
    return video_judge.load_video_judge().to(device)


@cache
def picture_judge(device: torch.device) -> judge.Judge:
    """The judge of the zoo's pictures on a device, likewise."""
    return judge.load_judge().to(device)
