"""Warping error of neighbouring frames: how much a video flickers beside what moves in it.

The optical flow from each frame to the next (OpenCV's DIS, Kroeger et al. 2016) moves the next
frame back; what differs where nothing is occluded is flicker, grain and shape that does not last
(Lai et al. 2018, "Learning Blind Video Temporal Consistency", eq. 6 and 7). The flow is the
video's own, as published: a video that stands still has none of it, so read it beside `temporal`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import QSearchError
from ..evaluation import Outcome
from ..networks import Needs
from ..pipelines import Prompts

higher_is_better = False
title = "warping error of neighbouring frames"
label = "warping error"
digits = 5
needs_video = True
needs_pictures = True
_NEEDS = Needs("flow", ("cv2",))
#: occluded where forward and backward flow do not cancel (Sundaram et al. 2010, eq. 5)
_SHARE, _PIXELS = 0.01, 0.5


def check(shape: tuple[int, ...] | None, prompts: Prompts) -> None:
    """Refuse where OpenCV is not installed."""
    _NEEDS.check()


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Mean squared difference a sample [N] on pixels in [0, 1], over neighbouring frames and the
    pixels that both show.

    Raises:
        QSearchError: the pipeline makes single pictures, or OpenCV is not installed.
    """
    _NEEDS.check()
    if outcome.pictures.ndim != 5 or outcome.pictures.shape[1] < 2:
        shape = " x ".join(map(str, outcome.pictures.shape))
        raise QSearchError(
            "flow compares neighbouring frames, [N, T, 3, H, W] with T of 2 or more; "
            f"given {shape}: leave flow out"
        )
    frames = ((outcome.pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
    clips = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
    return torch.tensor([_warping_error(clip) for clip in clips])


def _warping_error(clip: NDArray[np.uint8]) -> float:
    import cv2

    # Small clips need the finest scale: DIS stops a scale or two above it by default.
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    errors = []
    for now, then, a, b in zip(clip[:-1], clip[1:], gray[:-1], gray[1:], strict=True):
        forward, backward = dis.calc(a, b, None), dis.calc(b, a, None)
        back = _moved(backward, forward)
        size = np.square(forward).sum(-1) + np.square(back).sum(-1)
        seen = np.square(forward + back).sum(-1) < _SHARE * size + _PIXELS
        wrong = (now.astype(np.float32) - _moved(then, forward).astype(np.float32)) / 255
        errors.append(float(np.square(wrong)[seen].mean()) if seen.any() else 0.0)
    return float(np.mean(errors))


def _moved(picture: NDArray[Any], flow: NDArray[np.float32]) -> NDArray[Any]:
    """`picture` [H, W, C] read at each pixel's place after `flow` [H, W, 2] (x, y)."""
    import cv2

    rows, columns = np.indices(flow.shape[:2], dtype=np.float32)
    moved: NDArray[Any] = cv2.remap(
        picture,
        columns + flow[..., 0],
        rows + flow[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return moved
