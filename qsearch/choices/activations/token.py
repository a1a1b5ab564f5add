"""A scale for each token, from the token itself: dynamic, needs no calibration.

A token is a row of a linear layer's input; a convolution mixes positions, so that its whole picture
shares one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics import LayerInputs

word = ""  # what `+a8` says by saying nothing
needs_inputs = False
per_channel = False


def ends(channels: int, parts: bool) -> int:
    """Nothing is stored."""
    return 0


def ranges(x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each token of `x`, whose channels lie on axis `channel`, in
    shapes that spread over `x`.
    """
    axes = (-1,) if channel == -1 else tuple(range(1, x.ndim))
    return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
