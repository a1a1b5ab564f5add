"""HQQ: move the zero point so that a heavy-tailed norm of the error falls; needs no data.

Half-quadratic quantization (Badri and Shaji, 2023): split |W - Q(W)|_p with p = 0.7 into a shrinkage step, which sets the large errors
aside as outliers, and a closed form for the zero, the mean of what is left. The scale stays that of the range; the zero need not be whole
and is stored in fp16. Symmetric integers have no zero to move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes, nearest, spanning

needs_inputs = False
POWER, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20  # the authors' values


def supports(scheme: Scheme) -> bool:
    """Asymmetric integers."""
    return scheme.family == "uint"


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group]; each group keeps the zero with the least sum of |error|^0.7 that it met, min-max's included."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, zero = spanning(low, high, scheme)
    size = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)
    best, least, beta = zero, torch.full_like(zero, torch.inf), BETA
    for _ in range(ROUNDS + 1):
        made = nearest(groups, scale, zero, scheme)
        error = groups - made.values()
        loss = (error / size).abs().pow(POWER).sum(-1, keepdim=True)
        best, least = torch.where(loss < least, zero, best), torch.minimum(loss, least)
        outlier = _shrink(error, beta)
        zero = (made.codes - (groups - outlier) / scale).mean(-1, keepdim=True).clamp(-65504, 65504).half().float()
        beta *= KAPPA
    return nearest(groups, scale, best, scheme)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal step of |x|^p: errors near zero become zero, large ones stay almost as they are."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=torch.finfo(error.dtype).tiny).pow(POWER - 1) / beta).clamp(min=0)
