"""Rotations of a layer's channels in groups, by the regular Hadamard matrices of
`qsearch_kernels.hadamard`.

QuaRot (arXiv 2404.00456) rotates inputs and weights of language models, ConvRot (arXiv 2512.03673)
those of diffusion models, in groups that divide the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsearch_kernels.hadamard import GROUPS, matrix, rotate

from ..core.errors import QSearchError


def group_of(channels: int, wanted: int = 0) -> int:
    """The largest group that divides `channels`, or the `wanted` one.

    Raises:
        QSearchError: no group divides the channels, or `wanted` does not.
    """
    fitting = [group for group in GROUPS if channels % group == 0]
    if wanted and wanted not in fitting:
        nearest = f"; {max(fitting)} does" if fitting else "; none does: leave ~rotate out"
        raise QSearchError(f"a rotation of {wanted} channels must divide {channels}{nearest}")
    if not fitting:
        raise QSearchError(
            f"a rotation turns groups of {', '.join(map(str, GROUPS))} channels, and none divides "
            f"{channels}: leave ~rotate out"
        )
    return wanted or max(fitting)


def rotated(x: Tensor, group: int, axis: int = -1) -> Tensor:
    """`x` with its channels on `axis` turned in groups, in fp32; twice is `x` again."""
    moved = x.float().movedim(axis, -1)
    if torch.compiler.is_compiling():  # a compiler fuses a small product, not the CPU's own loop
        turned = (moved.unflatten(-1, (-1, group)) @ matrix(group).to(x.device)).flatten(-2)
    else:
        turned = rotate(moved.contiguous(), group)
    made: Tensor = turned.movedim(-1, axis)
    return made
