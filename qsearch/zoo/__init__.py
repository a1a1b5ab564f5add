"""The zoo: small denoisers trained properly, a world to train them on, and a judge."""

from __future__ import annotations

from pathlib import Path

NAMES = ("scenes-dit", "scenes-unet")
#: pipelines that make clips instead of pictures
VIDEO_NAMES = ("scenes-video",)
#: frames, height and width of their clips
CLIP = (15, 64, 64)
#: tokens that their prompts are padded to: enough for every caption, and Wan's 512 cost as much as
#: the clip's own tokens
CLIP_WORDS = 28
#: pipelines that plain diffusers loads
PIPELINES = (*NAMES, *VIDEO_NAMES)
#: pipelines whose class is ours: load with `qsearch.zoo.ecar.pipeline.EcarPipeline`
MULTISTAGE_NAMES = ("scenes-ecar",)


def folder(name: str) -> Path:
    """The saved pipeline of a zoo name.

    Plain diffusers loads those of `PIPELINES`; the classes of `MULTISTAGE_NAMES` are in `zoo.ecar`.
    """
    return Path(__file__).parent / name.replace("-", "_")
