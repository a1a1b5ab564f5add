"""The page's pictures side by side: what each shown plan made of a few captions, as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .findings import Findings
from .pictures import Sample, are_clips, load_plans, picture_path, resized

LARGEST = 256  # pixels of an embedded picture's longer side


def sheet_of(folder: Path, found: Findings, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the template's sheet reads: plans, a tile of each for every sample, and their kind."""
    shown, bits, captions = found.shown, found.bits, found.captions
    if not samples:
        return {"plans": shown, "samples": [], "count": 0, "small": False, "clips": False}
    pictures = load_plans(folder, shown)
    count, _, width, _ = pictures[shown[0]].shape

    def tile(name: str, index: int) -> dict[str, Any]:
        picture = pictures[name][index]
        image = resized(picture, min(LARGEST, max(picture.shape[:2])))
        file = io.BytesIO()
        image.save(file, format="PNG", optimize=True)
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        return {
            "plan": name,
            "bits": bits[name],
            "source": source,
            "width": image.width,
            "height": image.height,
        }

    cut = [
        {
            "worst": s.worst,
            "rank": s.rank,
            "caption": captions[s.index // max(1, count // len(captions))],
            "tiles": [tile(name, s.index) for name in shown],
        }
        for s in samples
    ]
    return {
        "plans": list(shown),
        "samples": cut,
        "count": count,
        "small": width <= LARGEST // 2,
        "clips": are_clips(picture_path(folder, shown[0])),
    }
