"""Distances between sets of pictures: features of made ones against those of real ones, or of full
precision's.

A metric of sets has `embed` (pictures -> features [N, D]) and `distance` (two sets of features -> a
number), so that pictures go through its network once, and a jackknife leaves out rows of features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import QSearchError

if TYPE_CHECKING:
    from .evaluation import Outcome

_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_BATCH = 32


def compared_features(metric: ModuleType | Any, reference: Outcome) -> Tensor:
    """Features of what a set is compared with: of `reference.real`'s pictures, or of full
    precision's.

    Args:
        metric: a metric of sets.
        reference: full precision's outcome.

    Returns:
        Features [M, D].

    Raises:
        QSearchError: the folder of real pictures has fewer than two, or one that can't be read.
    """
    if reference.real is None:
        found: Tensor = metric.embed(reference.pictures)
        return found
    height, width = reference.pictures.shape[-2:]
    return _real(metric, reference.real, (height, width), str(reference.pictures.device))


@cache
def _real(metric: Any, folder: Path, size: tuple[int, int], device: str) -> Tensor:
    return torch.cat([metric.embed(part.to(device)) for part in _batches(folder, size)])


def real_files(folder: Path) -> list[Path]:
    """Pictures of a folder in order of their names.

    Args:
        folder: where real pictures lie, in it or below it.

    Raises:
        QSearchError: there are fewer than two.
    """
    found = (
        sorted(p for p in folder.rglob("*") if p.suffix.lower() in _KINDS)
        if folder.is_dir()
        else []
    )
    if len(found) < 2:
        raise QSearchError(
            f"real pictures are a folder with two or more of {', '.join(_KINDS)}; "
            f"{folder} has {len(found)}"
        )
    return found


def _batches(folder: Path, size: tuple[int, int]) -> Iterator[Tensor]:
    """Pictures [N, 3, H, W] in [-1, 1], scaled so that the shorter side fits and cut in the
    middle.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    files = real_files(folder)
    for i in range(0, len(files), _BATCH):
        part = []
        for file in files[i : i + _BATCH]:
            try:
                with Image.open(file) as picture:
                    fitted = ImageOps.fit(picture.convert("RGB"), (size[1], size[0]))
            except (OSError, UnidentifiedImageError) as error:
                raise QSearchError(f"{file} is no picture that can be read: {error}") from error
            part.append(torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1))
        yield torch.stack(part).float() / 127.5 - 1
