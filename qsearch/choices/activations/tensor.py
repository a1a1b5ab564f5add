"""One scale for the whole input, static: the range that calibration saw. What lies beyond it is
clipped.

An input that is a concatenation (a long skip) has a scale for each of its parts, as its layer's
weight has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics import LayerInputs

word = "t"
needs_inputs = True
per_channel = False


def ends(channels: int, parts: bool) -> int:
    """One range, or one for each channel of an input in parts."""
    return channels if parts else 1


def ranges(x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry over calibration, as numbers that spread over `x`, or over its
    parts along axis `channel`.
    """
    import torch

    assert inputs is not None
    if not inputs.splits:
        return inputs.low.min(), inputs.high.max()
    shape = [1] * x.ndim
    shape[channel] = -1
    low = torch.cat([part.min().expand_as(part) for part in inputs.low.split(inputs.splits)])
    high = torch.cat([part.max().expand_as(part) for part in inputs.high.split(inputs.splits)])
    return low.view(shape), high.view(shape)
