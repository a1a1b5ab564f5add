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
#: pipelines whose class is ours, `qsearch.zoo.ecar.pipeline.EcarPipeline`
MULTISTAGE_NAMES = ("scenes-ecar",)
#: all pipelines; plain diffusers loads all but those of `MULTISTAGE_NAMES`
PIPELINES = (*NAMES, *VIDEO_NAMES, *MULTISTAGE_NAMES)


def folder(name: str) -> Path:
    """The saved pipeline of a zoo name.

    Plain diffusers loads it, but for those of `MULTISTAGE_NAMES`, whose classes are in `zoo.ecar`.

    Args:
        name: e.g. `scenes-dit`.

    Returns:
        A folder with `model_index.json`.
    """
    return Path(__file__).parent / name.replace("-", "_")
