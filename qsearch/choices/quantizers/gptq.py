"""GPTQ: round column after column, and let the columns to come make up for each error; needs the
layer's inputs.

Frantar et al., arXiv 2210.17323, algorithm 1: with H the second moments of the inputs and U the
upper Cholesky factor of its inverse, the error of column j over U_jj, times row j of U, is taken
from the later columns. Scales are min-max of a group when its first column is reached, errors
inside the group counted in (of the whole row at its start where a channel or the tensor shares
one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes, qparams_from_range, quantize_to_grid
from ..format import has_grid
from ..moments import columns_of, from_columns

needs_inputs = True
integer_zeros = True
learns_blocks = False
DAMPING = 0.01  # of the mean of H's diagonal, as the authors do


def supports(scheme: Scheme) -> bool:
    """Formats whose scale is any number: integers and floats."""
    return has_grid(scheme)


def quantize(groups: Tensor, scheme: Scheme, moments: Tensor) -> Codes:
    """Codes of fp32 groups [rows, groups, group] for inputs with `moments` [columns, columns]."""
    rows = columns_of(groups, scheme, moments).clone()
    upper = _factor(moments.to(rows))
    size = groups.shape[-1] if scheme.group > 0 else rows.shape[1]
    scales, zeros, rounded = [], [], torch.empty_like(rows)
    for begin in range(0, rows.shape[1], size):
        end = min(begin + size, rows.shape[1])
        part = rows[:, begin:end] if scheme.group != -1 else rows.reshape(1, -1)
        scale, zero = qparams_from_range(
            part.amin(1, keepdim=True), part.amax(1, keepdim=True), scheme
        )
        for j in range(begin, end):
            column = rows[:, j : j + 1]
            rounded[:, j : j + 1] = quantize_to_grid(
                column[:, None], scale[:, None], zero[:, None], scheme
            ).values()[:, 0]
            error = (column - rounded[:, j : j + 1]) / upper[j, j]
            rows[:, j + 1 :] -= error * upper[j, j + 1 :]
        scales.append(scale)
        zeros.append(zero)
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    return quantize_to_grid(from_columns(rounded, groups, scheme), scale, zero, scheme)


def _factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of damped `moments`, in fp64 while it is made."""
    square = moments.double()
    mean = square.diagonal().mean()
    damped = square + torch.eye(len(square), dtype=square.dtype, device=square.device) * (
        DAMPING * mean if mean > 0 else 1.0
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(moments.dtype)
