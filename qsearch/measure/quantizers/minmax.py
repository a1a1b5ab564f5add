"""Round to nearest on the range from smallest to largest weight; needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme

_SMALLEST = 2.0**-24  # of fp16, in which scales are stored


def supports(scheme: Scheme) -> bool:
    """Integers, symmetric (`int`) and asymmetric (`uint`)."""
    return scheme.family in ("int", "uint")


def quantize(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of fp32 groups [rows, groups, group].

    Symmetric: scale = max|w| / (2^(b-1) - 1), zero = 2^(b-1), a stored constant. Asymmetric: scale = (max - min) / (2^b - 1) with
    the range widened to hold 0, zero rounded to a code. Scales are rounded to fp16, as they are stored.
    """
    top = 2**scheme.bits - 1
    if scheme.family == "int":
        half = 2 ** (scheme.bits - 1)
        scale = _stored(groups.abs().amax(-1, keepdim=True) / (half - 1))
        zero = torch.full_like(scale, half)
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = _stored((high - low) / top)
        zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    return codes.to(torch.uint8), scale, zero


def _stored(scale: Tensor) -> Tensor:
    return scale.clamp(min=_SMALLEST, max=65504.0).half().float()
