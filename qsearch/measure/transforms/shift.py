"""TaQ-DiT's shift of post-GELU inputs: subtract the middle of each channel's range, add W z to the bias.

arXiv 2411.14172: z_c follows (max + min) / 2 over calibration batches with a momentum of 0.95; over many batches in random order that is their
mean, which is what is taken here. The subtraction stays at run time, since it can't pass through the GELU before it.
"""

from __future__ import annotations

from torch import Tensor

from ...core.scheme import Scheme
from ..calibration import LayerInputs
from ..treatment import Transform

needs_linear = True  # a convolution pads with zeros, which a shifted input no longer has


def fit(weight: Tensor, inputs: LayerInputs, scheme: Scheme, amount: float) -> Transform:
    """Shifts for a weight [rows, channels, taps]; `amount` is not used."""
    return Transform(shift=inputs.middle)
