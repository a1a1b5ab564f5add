"""A scale for each input channel, static: the ranges that calibration saw.

Static, because only then can a scale go into the weight's column, without which no integer product
could add channels up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics import LayerInputs

word = "c"
needs_inputs = True
per_channel = True


def ends(channels: int, parts: bool) -> int:
    """A range for each channel."""
    return channels


def ranges(x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each channel over calibration, in shapes that spread over `x`,
    whose channels lie on axis `channel`.
    """
    assert inputs is not None
    shape = [1] * x.ndim
    shape[channel] = -1
    return inputs.low.view(shape), inputs.high.view(shape)
