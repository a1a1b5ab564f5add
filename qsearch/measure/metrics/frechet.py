"""Fréchet distance between the judge's features of the pictures, or clips, and of real scenes with
the same captions' world.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ...zoo import judge, moving_scenes, scenes, video_judge
from ..evaluation import Outcome
from ..pipelines import Prompts
from ..predicted_x0 import PredictedX0
from .alignment import clip_judge, picture_judge

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

higher_is_better = False
title = "Fréchet distance"
label = "Fréchet"
digits = 1
needs_video = False
#: pictures of the zoo's world, which the judge reads
SCENES = (3, 64, 64)
needs_pictures = True
needs_scenes = True
#: scenes (and clips) that the pictures are compared with, and the seed that draws them
REAL, REAL_CLIPS, REAL_SEED = 2048, 512, 777


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse pictures that are not the zoo's scenes."""
    if shape is not None:
        _check_shape(shape)


def _check_shape(shape: tuple[int, ...]) -> None:
    if tuple(shape) != SCENES:
        raise QSearchError(
            f"frechet goes by a judge of the zoo's scenes of 3x64x64; these pictures are "
            f"{'x'.join(map(str, shape))}: leave frechet out"
        )


def measure(outcome: Outcome, reference: Outcome) -> float:
    """One number for all samples (torchmetrics' FID on the judge's 128 features; biased upwards for
    few samples, equally for all plans).
    """
    return frechet(outcome.pictures)


def frechet(pictures: Tensor) -> float:
    """Fréchet distance of pictures [N, 3, 64, 64] in [-1, 1] to `REAL` rendered scenes, of clips
    [N, 15, 3, 64, 64] to `REAL_CLIPS`. Raises `QSearchError` for fewer than two.
    """
    _check_shape(tuple(pictures.shape[-3:]))
    if len(pictures) < 2:
        raise QSearchError(
            "a Fréchet distance needs two pictures, and three for its error bar; "
            "evaluate more samples, or leave the metric out"
        )
    moving = pictures.ndim == 5
    if moving:
        pictures = video_judge.as_clips(pictures)
    metric = _metric(moving)
    metric.reset()  # of the pictures; the real scenes stay
    for batch in pictures.split(64 if moving else 256):
        metric.update(batch, real=False)
    return float(metric.compute())


@cache
def _metric(moving: bool) -> FrechetInceptionDistance:
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = video_judge.load_video_judge() if moving else judge.load_judge()
    metric = FrechetInceptionDistance(
        _Features(network), reset_real_features=False, input_img_size=(3, 64, 64)
    )
    generator = torch.Generator().manual_seed(REAL_SEED)
    if moving:
        clips = moving_scenes.draw_clips(REAL_CLIPS, generator)
        for i in range(0, REAL_CLIPS, 64):
            metric.update(moving_scenes.render(clips[i : i + 64]), real=True)
    else:
        drawn = scenes.draw_scenes(REAL, generator)
        for i in range(0, REAL, 64):  # rendered at once they would leave the caches
            metric.update(scenes.render(drawn[i : i + 64]), real=True)
    return metric


class _Features(torch.nn.Module):
    """The judge's features for torchmetrics, which hands pictures of a network of one's own on as
    they are, and reads `num_features`.
    """

    def __init__(self, network: judge.Judge | video_judge.VideoJudge) -> None:
        super().__init__()
        self.network, self.num_features = network, network.num_features

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.network.embed(pictures)
        return features


def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
    """The judge's features, over their squared norm: how far a choice moves a picture in the space
    of the Fréchet distance.

    Raises `QSearchError` for pictures of another world: the judge knows the zoo's 64x64 scenes
    only.
    """
    pictures, own = made.pictures, reference.pictures.detach()
    _check_shape(tuple(pictures.shape[-3:]))
    moving = pictures.ndim == 5
    network = (clip_judge if moving else picture_judge)(pictures.device)
    if moving:
        pictures, own = video_judge.as_clips(pictures), video_judge.as_clips(own)
    return network.embed(pictures), network.embed(own).double().square().sum(1)
