"""HQQ: move the zero point so that a heavy-tailed norm of the error falls; needs no data.

Half-quadratic quantization (Badri and Shaji, 2023): split |W - Q(W)|_p with p = 0.7 into a
shrinkage step, which sets the large errors aside as outliers, and a closed form for the zero, the
mean of what is left. The scale stays that of the range; the zero need not be whole and is stored in
fp16. Symmetric integers have no zero to move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes, qparams_from_range, quantize_to_grid
from ..format import format_of, has_grid

needs_inputs = False
integer_zeros = False
learns_blocks = False
POWER, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20  # the authors' values
ENOUGH = 1e-3
_CHUNK = 2**17  # weights that stay in a core's cache


def supports(scheme: Scheme) -> bool:
    """Formats with a zero point: asymmetric integers."""
    return has_grid(scheme) and format_of(scheme).stores_zero


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group]; each group keeps the zero with the least sum of
    |error|^0.7 that it met, min-max's included.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = qparams_from_range(low, high, scheme)
    chunk = max(1, _CHUNK // groups[0].numel())
    found = [
        _solve(*parts, scheme)
        for parts in zip(groups.split(chunk), scale.split(chunk), zero.split(chunk), strict=True)
    ]
    return quantize_to_grid(groups, scale, torch.cat(found), scheme)


def _solve(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The best zero of each group, from `zero` on; ends when a round lowers the loss of all groups
    together by less than `ENOUGH`.

    In units of the scale, where a weight is u and its error u + zero - code, the new zero,
    mean(code - (u - outlier)), is zero - mean(error - outlier).
    """
    own, top = groups / scale, 2**scheme.bits - 1
    best, least, beta, before = zero, torch.full_like(zero, torch.inf), BETA, torch.inf
    for _ in range(ROUNDS + 1):
        place = own + zero
        error = place - place.round().clamp_(0, top)
        loss = error.abs().pow_(POWER).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, zero, best), torch.minimum(loss, least)
        now = float(least.sum())
        if now > before * (1 - ENOUGH):
            break
        before = now
        zero = (
            (zero - (error - _shrink(error * scale, beta) / scale).mean(-1, keepdim=True))
            .clamp(-65504, 65504)
            .half()
            .float()
        )
        beta *= KAPPA
    return best


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal step of |x|^p: errors near zero become zero, large ones stay almost as they
    are.
    """
    size = error.abs()
    if float(size.max()) <= beta ** (
        1 / (POWER - 2)
    ):  # as with most weights: all are small, and none is set aside
        return torch.zeros_like(error)
    return error.sign() * (
        size - size.clamp(min=torch.finfo(error.dtype).tiny).pow(POWER - 1) / beta
    ).clamp(min=0)
