"""The denoisers trained here and shipped in the package: scenes-dit, -unet and -video."""

from __future__ import annotations

from pathlib import Path

from ... import zoo

NAMES = zoo.PIPELINES


def folder(model: str) -> Path | None:
    """The pipeline's folder in the package, or None when `model` is no name of the zoo."""
    return zoo.folder(model) if model in NAMES else None
