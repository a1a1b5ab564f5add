"""Round to nearest on the range from smallest to largest weight; needs no data.

For block formats this is what their specifications ask for: OCP Microscaling Formats v1.0, section 6.3 (a power of two, so that the largest
weight falls into the largest binade; what lies beyond the largest value is clipped), and NVIDIA's NVFP4 (a tensor scale that
puts the largest block scale at e4m3's largest value, then block scales rounded to e4m3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes, element, largest, qparams_from_range, quantize_to_grid
from ..floats import FloatFormat

needs_inputs = False
integer_zeros = True
learns_blocks = False
_FP8 = FloatFormat.named("e4m3")


def supports(scheme: Scheme) -> bool:
    """Integers, symmetric (`int`) and asymmetric (`uint`), floats and block formats."""
    return scheme.family in ("int", "uint", "float", "block")


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group].

    Symmetric: scale = max|w| / (2^(b-1) - 1), zero = 2^(b-1), a stored constant. Asymmetric: scale = (max - min) / (2^b - 1) with
    the range widened to hold 0, zero rounded to a code. Floats: max|w| is their largest value. Scales are rounded to fp16, as they are stored.
    """
    if scheme.format == "nvfp4":
        return _nvfp4(groups, scheme)
    if scheme.family == "block":
        return _microscaled(groups, scheme)
    scale, zero = qparams_from_range(
        groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), scheme
    )
    return quantize_to_grid(groups, scale, zero, scheme)


def _microscaled(groups: Tensor, scheme: Scheme) -> Codes:
    size = groups.abs().amax(-1, keepdim=True)
    exponent = (
        torch.frexp(size).exponent - 1 - element(scheme).highest
    )  # floor(log2) is exact this way
    exponent = torch.where(size > 0, exponent, -127).clamp(-127, 127)
    scale = torch.exp2(exponent.double()).float()
    return quantize_to_grid(groups, scale, torch.zeros_like(scale), scheme)


def _nvfp4(groups: Tensor, scheme: Scheme) -> Codes:
    size = groups.abs().amax(-1, keepdim=True)
    unit = max(float(size.max()) / (largest(scheme) * _FP8.top), 2.0**-126)
    codes = _FP8.encode(size / (largest(scheme) * unit)).clamp(
        min=1
    )  # a block of zeros gets the smallest scale, not none
    scale = _FP8.values(groups.device)[codes.int()]
    return quantize_to_grid(groups, scale, torch.zeros_like(scale), scheme, unit)
