"""The weights of a packed layer: packed ones, whose layout is said by their format, and those that
stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..choices.packed_weight import AbstractPackedWeight


class KeptWeight(nn.Module):
    """A weight in full precision whose layer rounds its input (`keep+a8`): the same interface as a
    packed one.
    """

    devices: frozenset[str] = frozenset()
    convolving: frozenset[str] = frozenset()

    def __init__(self, values: nn.Parameter, axis: int) -> None:
        super().__init__()
        self.values, self.axis = values, axis

    def forward(self) -> Tensor:
        """The weight, as a call: hooks that fetch what was offloaded hang on it."""
        return self.values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as rows [rows, columns]."""
        values: Tensor = self()
        return values.movedim(self.axis, 0).flatten(1).to(dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight."""
        return self.values.nbytes


AnyWeight = AbstractPackedWeight | KeptWeight


def stored_bytes(module: nn.Module) -> int:
    """Bytes of everything in `module` that a state dict holds, each tensor counted once."""
    found: dict[int, Any] = {id(t): t for t in module.state_dict(keep_vars=True).values()}
    return sum(t.nbytes for t in found.values())
