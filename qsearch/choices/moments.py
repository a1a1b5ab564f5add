"""Rows as a layer multiplies them, and the error of its output by the second moments of its inputs.

A layer's output error for a weight error E [rows, columns] is E x. Its mean square over inputs is
tr(E H E^T), H = mean(x x^T): all that a method needs to know of the inputs, and exact for every
sample that went into H, where training on batches only draws from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.scheme import Scheme


def columns_of(groups: Tensor, scheme: Scheme, moments: Tensor) -> Tensor:
    """Groups [rows, groups, group] as the rows [rows, columns] that meet inputs of `moments`
    [columns, columns], without padding.
    """
    if scheme.group == -1:
        return groups.reshape(-1, len(moments))
    return groups.reshape(len(groups), -1)[:, : len(moments)]


def from_columns(rows: Tensor, groups: Tensor, scheme: Scheme) -> Tensor:
    """Rows [rows, columns] as groups of the shape of `groups`; padding repeats the last column."""
    if scheme.group == -1:
        return rows.reshape(groups.shape)
    missing = groups[0].numel() - rows.shape[1]
    return torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1).reshape(groups.shape)


def output_error(error: Tensor, moments: Tensor) -> Tensor:
    """Mean squared output error [rows] of a weight error [rows, columns]."""
    return ((error @ moments.to(error)) * error).sum(1)
