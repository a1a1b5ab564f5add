"""Regular Hadamard rotations of groups of channels: Kronecker powers of the 4x4 matrix with one -1 in each row.

The matrix is symmetric and orthogonal, so that it is its own inverse; every row has the same sum, so that no channel is favoured
by a constant (ConvRot, arXiv 2512.03673; QuaRot, arXiv 2404.00456, for rotations of inputs and weights).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..core.errors import QSearchError

#: sizes of groups, the largest first
GROUPS = (256, 64, 16)


def group_of(channels: int, wanted: int = 0) -> int:
    """The largest group that divides `channels`, no larger than `wanted` where that is given.

    Raises:
        QSearchError: no group divides the channels, or `wanted` does not.
    """
    if wanted:
        if wanted in GROUPS and channels % wanted == 0:
            return wanted
        fitting = [g for g in GROUPS if channels % g == 0]
        nearest = f"; {max(fitting)} does" if fitting else "; none does: leave ~rotate out"
        raise QSearchError(f"a rotation of {wanted} channels must divide {channels}{nearest}")
    for group in GROUPS:
        if channels % group == 0:
            return group
    raise QSearchError(
        f"a rotation turns groups of {', '.join(map(str, GROUPS))} channels, and none divides {channels}: leave ~rotate out"
    )


@lru_cache(maxsize=8)
def hadamard(group: int) -> Tensor:
    """The matrix [group, group], fp32: a power of 4, entries +-1 / sqrt(group)."""
    step = (torch.ones(4, 4) - 2 * torch.eye(4)) / 2
    made = torch.ones(1, 1)
    while len(made) < group:
        made = torch.kron(made, step)
    return made


def rotated(x: Tensor, group: int, axis: int = -1) -> Tensor:
    """`x` with its channels on `axis` turned in groups, in fp32; twice is `x` again."""
    matrix = hadamard(group).to(x.device)
    moved = x.float().movedim(axis, -1)
    turned = moved.unflatten(-1, (-1, group)) @ matrix
    made: Tensor = turned.flatten(-2).movedim(-1, axis)
    return made
