"""Clip the range where that lowers the sum of |error|^2.4; needs no data.

The search of BRECQ, Q-Diffusion and Qua²SeDiMo: shrink the range in steps, round, keep the best of
each group. Their ten steps of a tenth are taken in halves here; exponent 2.4 is theirs, and weighs
large errors more than the squared error does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes, qparams_from_range, quantize_to_grid
from ..format import has_grid

needs_inputs = False
integer_zeros = True
learns_blocks = False
POWER = 2.4
SHRINK = tuple(1 - i / 20 for i in range(17))  # of the range, down to a fifth


def supports(scheme: Scheme) -> bool:
    """Formats whose scale is any number: integers and floats."""
    return has_grid(scheme)


def quantize(groups: Tensor, scheme: Scheme, *, power: float = POWER) -> Codes:
    """Codes of fp32 groups [rows, groups, group] on the grid with the least sum of |error|^`power`;
    the whole range wins a draw.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = qparams_from_range(low, high, scheme)
    least = _loss(groups, scale, zero, scheme, power)
    for shrink in SHRINK[1:]:
        trial = qparams_from_range(low * shrink, high * shrink, scheme)
        loss = _loss(groups, *trial, scheme, power)
        better = loss < least
        scale, zero = torch.where(better, trial[0], scale), torch.where(better, trial[1], zero)
        least = torch.minimum(loss, least)
    return quantize_to_grid(groups, scale, zero, scheme)


def _loss(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, power: float) -> Tensor:
    # In units of the range: errors of small weights would vanish when raised to a power.
    size = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
    return (
        ((quantize_to_grid(groups, scale, zero, scheme).values() - groups) / size)
        .abs()
        .pow(power)
        .sum(-1, keepdim=True)
    )
