"""A small model for tests of transforms, and recorded calls of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsearch.measure.calls import Call


class Layers(nn.Module):
    """A convolution and two linear layers; a few channels of the second's input are ten times as
    large as the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 48, 3, padding=1)
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 4)
        with torch.no_grad():
            self.first.weight[::13] *= 10

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = torch.tanh(self.conv(sample)).flatten(2).mT + timestep[:, None, None] / 1000
        made: Tensor = self.second(self.first(h)).mT.unflatten(2, sample.shape[2:])
        return made


CALLS = [
    Call(
        (),
        {
            "sample": torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(i)),
            "timestep": torch.tensor([10.0, 500.0]),
        },
        i,
    )
    for i in range(2)
]
