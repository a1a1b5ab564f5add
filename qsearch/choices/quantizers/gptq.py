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
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.scheme import Scheme
from ..codes import Codes, qparams_from_range, quantize_to_grid
from ..format import grid_of, has_grid
from ..moments import columns_of, from_columns

needs_inputs = True
integer_zeros = True
learns_blocks = False
DAMPING = 0.01  # of the mean of H's diagonal, as the authors do
#: columns whose errors are taken from all later ones at once (the authors' lazy batch updates)
LAZY = 128
#: moments of the last layer -> their factor
_last: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def supports(scheme: Scheme) -> bool:
    """Formats whose scale is any number: integers and floats."""
    return has_grid(scheme)


def quantize(groups: Tensor, scheme: Scheme, moments: Tensor) -> Codes:
    """Codes of fp32 groups [rows, groups, group] for inputs with `moments` [columns, columns]."""
    rows = columns_of(groups, scheme, moments)
    upper, grid = _factor(moments.to(rows)), grid_of(scheme)
    left = rows.T.clone(memory_format=torch.contiguous_format)  # [columns, rows]
    rounded, count = torch.empty_like(left), len(left)
    size = groups.shape[-1] if scheme.group > 0 else count
    scales, zeros = [], []
    for begin in range(0, count, size):
        end = min(begin + size, count)
        part = left[begin:end] if scheme.group != -1 else left.reshape(-1, 1)
        scale, zero = qparams_from_range(part.amin(0), part.amax(0), scheme)
        for start in range(begin, end, LAZY):
            stop = min(start + LAZY, end)
            errors = torch.empty_like(left[start:stop])
            for j in range(start, stop):
                torch.sub(
                    left[j],
                    rounded[j].copy_(grid.round_to_grid(left[j], scale, zero, scheme.format)),
                    out=errors[j - start],
                ).div_(upper[j, j])
                left[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    scale, zero = torch.stack(scales, 1)[..., None], torch.stack(zeros, 1)[..., None]
    return quantize_to_grid(from_columns(rounded.T, groups, scheme), scale, zero, scheme)


def _factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of damped `moments`, in fp64 while it is made; that of
    the last moments is kept, since a layer is quantized at several numbers of bits in turn.
    """
    if moments not in _last:
        _last.clear()
        _last[moments] = _made(moments)
    factor: Tensor = _last[moments]
    return factor


def _made(moments: Tensor) -> Tensor:
    square = moments.double()
    mean = square.diagonal().mean()
    damped = square + torch.eye(len(square), dtype=square.dtype, device=square.device) * (
        DAMPING * mean if mean > 0 else 1.0
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(moments.dtype)
