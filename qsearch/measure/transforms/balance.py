"""SmoothQuant's channel balancing: divide each input channel by s, multiply the weight's column by it.

s_c = max|x_c|^alpha / max|w_c|^(1 - alpha) (Xiao et al., arXiv 2211.10438, eq. 4); ViDiT-Q uses alpha from 0.1 to 0.3 on diffusion transformers.
`~balance30` has alpha = 0.30, `~balance` 0.50. One s for all steps: ViDiT-Q's one s a range of steps keeps a copy of the weights for each.
"""

from __future__ import annotations

from torch import Tensor

from ...core.scheme import Scheme
from ..calibration import LayerInputs
from ..treatment import Transform

needs_linear = False
_SMALLEST = 1e-5  # SmoothQuant's: a channel that is never used must not be blown up


def fit(weight: Tensor, inputs: LayerInputs, scheme: Scheme, amount: float) -> Transform:
    """Scales for a weight [rows, channels, taps]; `amount` is alpha."""
    size = inputs.high.abs().maximum(inputs.low.abs()).clamp(min=_SMALLEST)
    columns = weight.abs().amax((0, 2)).clamp(min=_SMALLEST)
    return Transform(scale=(size.pow(amount) / columns.pow(1 - amount)).clamp(min=_SMALLEST))
