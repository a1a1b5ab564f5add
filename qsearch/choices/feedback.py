"""Block-LDL feedback: quantize some columns at a time, and let those to come make up for the error.

With H = mean(x x^T) the second moments of a layer's inputs, U the upper Cholesky factor of H^-1
(damped) and B a block of columns, the error E of the block is answered by the columns F after it
with

    W_F <- W_F - E  U_BB^-1  U_BF

the least squared output error that they can reach (GPTQ, arXiv 2210.17323, eq. 3, for blocks; the
block-LDL rounding of QuIP#, arXiv 2402.04396, section 4.1, is the same update). A code whose unit
spans several columns, as a tile of a trellis code does, needs blocks; one of single columns gets
GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import QSearchError

DAMPING = 0.01  # of the mean of H's diagonal
_RUN = 128  # columns after which all the later ones are answered for in one product


def upper_factor(moments: Tensor, layer: str = "the layer") -> Tensor:
    """Upper Cholesky factor U of the inverse of damped `moments` [columns, columns]: H^-1 = U^T U.

    Raises `QSearchError` for moments that are not finite, not square or not positive.
    """
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
        raise QSearchError(
            f"second moments are [columns, columns]; those of {layer} are {tuple(moments.shape)}"
        )
    if not bool(torch.isfinite(moments).all()):
        raise QSearchError(
            f"second moments must be finite; those of {layer} hold "
            f"{int((~torch.isfinite(moments)).sum())} numbers that are not: calibrate again, "
            "on calls whose activations do not overflow"
        )
    square = moments.double()
    mean = float(square.diagonal().mean())
    damp = DAMPING * mean if mean > 0 else 1.0
    damped = square + damp * torch.eye(len(square), dtype=square.dtype, device=square.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise QSearchError(
            f"second moments, a mean of x x^T, have no negative eigenvalues; those of {layer} do"
        )
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def with_feedback(
    weight: Tensor,
    block: int,
    moments: Tensor,
    quantize: Callable[[Tensor, int], Tensor],
    layer: str,
) -> Tensor:
    """fp32 [rows, columns]: what `quantize(columns, first column)` made of each block of `weight`.

    Args:
        weight: fp32 [rows, columns].
        block: columns that are quantized together; the last block may have fewer.
        moments: [columns, columns], the mean of x x^T over the layer's inputs.
        quantize: fp32 [rows, block] -> fp32 [rows, block], the values of its codes.
        layer: its name in errors.

    Raises:
        QSearchError: for moments that are not finite, not square or of another size.
    """
    if moments.shape[0] != weight.shape[1]:
        raise QSearchError(
            f"{layer} has {weight.shape[1]} columns and moments of {moments.shape[0]}; moments are "
            "those of the inputs that its rows are multiplied with, rotated if these are"
        )
    left, out = weight.clone(), torch.empty_like(weight)
    upper = upper_factor(moments, layer).to(weight.device)
    columns = weight.shape[1]
    run = max(1, _RUN // block) * block
    for first in range(0, columns, run):
        last = min(first + run, columns)
        errors = torch.empty_like(left[:, first:last])  # of each block, times U_BB^-1
        for begin in range(first, last, block):
            end = min(begin + block, last)
            out[:, begin:end] = quantize(left[:, begin:end], begin)
            error = left[:, begin:end] - out[:, begin:end]
            own = torch.linalg.solve_triangular(
                upper[begin:end, begin:end], error, upper=True, left=False
            )
            errors[:, begin - first : end - first] = own
            left[:, end:last].addmm_(own, upper[begin:end, end:last], alpha=-1)
        left[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return out
