"""One scale for the whole input, static: the range that calibration saw. What lies beyond it is clipped."""

from __future__ import annotations

from torch import Tensor

from ..calibration import LayerInputs

needs_inputs = True


def ranges(x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry over calibration, as numbers that spread over `x`."""
    assert inputs is not None
    return inputs.low.min(), inputs.high.max()
