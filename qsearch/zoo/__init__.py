"""The zoo: small denoisers trained properly, a world to train them on, and a judge."""

from __future__ import annotations

from pathlib import Path

NAMES = ("scenes-dit", "scenes-unet")
#: pipelines that make clips instead of pictures
VIDEO_NAMES = ("scenes-video",)


def folder(name: str) -> Path:
    """The saved pipeline of a zoo name, loadable by `diffusers.DiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / name.replace("-", "_")
