"""Migration of outlying channels into the weight: cap each channel's range at a threshold, chosen by the error of the output.

Outlier Suppression+ (Wei et al., arXiv 2304.09145, section 4.2), which TaQ-DiT's reconstruction-driven migration follows: for a threshold T,
s_c = max(1, max_c / T, min_c / -T), and T is the one of a grid for which the rounded layer's output is nearest to the full-precision one on
calibration rows. T = the largest entry leaves everything as it is, so that no harm is done on those rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..calibration import LayerInputs
from ..quantization import from_groups, quantize
from ..treatment import Transform, rounded

needs_linear = True
STEPS = 24  # thresholds, evenly spaced in the logarithm, from a hundredth of the largest entry up


def fit(weight: Tensor, inputs: LayerInputs, scheme: Scheme, amount: float) -> Transform:
    """Scales for a weight [rows, channels, 1]; `amount` is not used."""
    matrix, x = weight[:, :, 0], inputs.rows
    truth = x @ matrix.T
    largest = inputs.high.abs().maximum(inputs.low.abs()).max().clamp(min=torch.finfo(x.dtype).tiny)
    best, least = torch.ones_like(inputs.low), torch.inf
    for threshold in torch.logspace(0, -2, STEPS, device=x.device) * largest:
        scale = torch.maximum(inputs.high / threshold, inputs.low / -threshold).clamp(min=1)
        error = float(
            (
                _output(
                    matrix * scale, x / scale, inputs.moved(torch.zeros_like(scale), scale), scheme
                )
                - truth
            )
            .square()
            .sum()
        )
        if error < least:
            best, least = scale, error
    return Transform(scale=best)


def _output(matrix: Tensor, x: Tensor, inputs: LayerInputs, scheme: Scheme) -> Tensor:
    """What the layer gives with its weight rounded to nearest and its input rounded as the scheme says."""
    if scheme.format != "keep":
        code = quantize(matrix, Scheme(scheme.format, scheme.group)).code
        matrix = from_groups(code.values(), matrix.shape, 0)
    return rounded(x, scheme, inputs, -1) @ matrix.T
