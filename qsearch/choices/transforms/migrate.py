"""Migration of outlying channels into the weight: cap each channel's range at a threshold, chosen
by the error of the output.

Outlier Suppression+ (Wei et al., arXiv 2304.09145, section 4.2), which TaQ-DiT's
reconstruction-driven migration follows: for a threshold T, s_c = max(1, max_c / T, min_c / -T), and
T is the one of a grid for which the rounded layer's output is nearest to the full-precision one on
calibration rows. T = the largest entry leaves everything as it is, so that no harm is done on those
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...core.scheme import Scheme
from ...core.words import Buffer, Needs, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics import LayerInputs
    from ..transform import AbstractPackedStep, AbstractStep, Site

stage = Stage.SMOOTHING
number = None
scales_weight = True
unseen = ""
needs = Needs.STATISTICS
needs_linear = True
adds_bias = False
STEPS = 24  # thresholds, evenly spaced in the logarithm, from a hundredth of the largest entry up


def stored(shape: Sequence[int], axis: int, number: int) -> dict[str, Buffer]:
    """A divisor for each input channel."""
    return {"divisor": Buffer((shape[1 - axis],), typical=1.0)}


def fit(site: Site) -> AbstractStep:
    """The scale of each input channel."""
    import torch

    from ..affine import ChannelAffine

    matrix, inputs = site.weight[:, :, 0], site.inputs
    x = inputs.rows
    truth = x @ matrix.T
    largest = inputs.high.abs().maximum(inputs.low.abs()).max().clamp(min=torch.finfo(x.dtype).tiny)
    best, least = torch.ones_like(inputs.low), torch.inf
    for threshold in torch.logspace(0, -2, STEPS, device=x.device) * largest:
        scale = torch.maximum(inputs.high / threshold, inputs.low / -threshold).clamp(min=1)
        moved = inputs.moved(torch.zeros_like(scale), scale)
        made = _output(matrix * scale, x / scale, moved, site.scheme)
        error = float((made - truth).square().sum())
        if error < least:
            best, least = scale, error
    return ChannelAffine.of(scale=best)


def unpack(
    stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
) -> AbstractPackedStep:
    """Division by the stored divisor."""
    from ..affine import PackedAffine

    return PackedAffine.of(stored)


def _output(matrix: Tensor, x: Tensor, inputs: LayerInputs, scheme: Scheme) -> Tensor:
    """What the layer gives with its weight rounded to nearest and its input rounded as the scheme
    says.
    """
    from ..fake_quantization import fake_quantize
    from ..quantization import from_groups, quantize

    if scheme.format != "keep":
        code = quantize(matrix, Scheme(scheme.format, scheme.group)).code
        matrix = from_groups(code.values(), matrix.shape, 0)
    return fake_quantize(x, scheme, inputs, -1) @ matrix.T
