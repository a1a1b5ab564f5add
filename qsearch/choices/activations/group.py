"""A scale for each group of channels of each token, `+a4g64`, from the token itself: dynamic, needs
no calibration.

The 4-bit inputs of SVDQuant (arXiv 2411.05007, section 4) are rounded like this, in groups of 64.
Groups are counted from the first channel; the last may be smaller. A convolution mixes positions,
so that a group of channels of its whole picture shares one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ...core.words import Number

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..statistics import LayerInputs

word = "g"
needs_inputs = False
per_channel = True
number = Number("channels that share a scale", 8, 1024, multiple=8)


@dataclass(frozen=True)
class Groups:
    """The grain with a number of channels."""

    ranges: Callable[[Tensor, int, LayerInputs | None], tuple[Tensor, Tensor]]
    word: str = word
    needs_inputs: bool = needs_inputs
    per_channel: bool = per_channel

    def ends(self, channels: int, parts: bool) -> int:
        """Nothing is stored."""
        return ends(channels, parts)


def ends(channels: int, parts: bool) -> int:
    """Nothing is stored."""
    return 0


def sized(number: int) -> Groups:
    """The grain for groups of `number` channels."""
    return Groups(partial(ranges, number))


def ranges(size: int, x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each group of `size` channels of `x`, or zero if that lies
    beyond them, in shapes that spread over `x`, whose channels lie on axis `channel`.
    """
    import torch
    import torch.nn.functional as F

    count = x.shape[channel]
    groups = -(-count // size)

    def spread(reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
        ends = x if channel == -1 else reduce(x.flatten(2), 2)
        padded = F.pad(ends, (0, groups * size - count)).unflatten(-1, (groups, size))
        wide = reduce(padded, -1).repeat_interleave(size, -1)[..., :count]
        return wide if channel == -1 else wide.view(*wide.shape, *[1] * (x.ndim - 2))

    return spread(torch.amin), spread(torch.amax)
