"""Inception-v3's features as FID and KID take them: torch-fidelity's port of the original network,
by torchmetrics.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .networks import Needs, as_bytes, each_frame

NEEDS = Needs(
    "fid",
    ("torch_fidelity", "torchvision"),
    "Inception's weights of the original FID (95 MB)",
    "weights-inception-2015-12-05-6726825d.pth",
)
_BATCH = 32
FEATURES = 2048


class Passed(nn.Module):
    """Hands features on, for torchmetrics' distances between sets of features that are already
    there.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, D] as they are."""
        return features


@torch.no_grad()
def embed_pictures(metric: str, pictures: Tensor) -> Tensor:
    """Features [N, 2048] of pictures [N, 3, H, W] in [-1, 1], of videos of each frame, as a PNG's
    bytes hold them.

    Args:
        metric: who asks, for the error.
        pictures: pictures or videos.

    Raises:
        QSearchError: torch-fidelity or its weights are missing.
    """
    net = _network(pictures.device)
    parts = each_frame(pictures).split(_BATCH)
    return torch.cat([net(as_bytes(part)).cpu() for part in parts])


@cache
def _network(device: torch.device) -> Any:
    with NEEDS.loading():
        from torchmetrics.image.fid import NoTrainInceptionV3

        return NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)]).to(device)
