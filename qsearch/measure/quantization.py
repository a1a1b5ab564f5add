"""Quantized: codes with scales, and the contract of everything that makes them.

A weight is seen as rows: its channel axis first, the rest flattened, cut into groups that share a scale. A plug-in in
`quantizers/` gets those groups and a scheme, and returns codes and scales; storage, padding and shapes are settled here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core import plugins
from ..core.errors import QSearchError
from ..core.scheme import Scheme

#: family of formats -> the method used where the scheme names none
DEFAULT_METHODS = {"int": "minmax", "uint": "minmax", "float": "minmax", "block": "minmax", "codebook": "kmeans"}


@dataclass(frozen=True)
class Quantized:
    """Codes [rows, groups, group] (uint8, counted from 0) with `scale` and `zero` [rows, groups, 1] as fp32 holding fp16 values.

    A weight is `scale * (code - zero)`. `shape` and `axis` say how to lay the rows out again, `padding` how many codes of each row are filling.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme
    shape: tuple[int, ...]
    axis: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [shape] that the codes stand for."""
        return from_groups(self.scale * (self.codes.float() - self.zero), self.shape, self.axis).to(dtype)


class AbstractQuantizer(Protocol):
    """What a module in `quantizers/` provides. Its contract is `qsearch.testing.QuantizerContract`."""

    def supports(self, scheme: Scheme) -> bool:
        """Whether this method can carry out the scheme's format."""
        ...

    def quantize(self, groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        """Groups [rows, groups, group] in fp32 -> codes (uint8, same shape), scale and zero [rows, groups, 1]."""
        ...


def to_groups(weight: Tensor, scheme: Scheme, axis: int = 0) -> Tensor:
    """Weight -> fp32 [rows, groups, group]; an incomplete last group is filled with the row's last weight, which moves no range."""
    rows = weight.detach().float().movedim(axis, 0).flatten(1) if weight.ndim > 1 else weight.detach().float()[None]
    if scheme.group == -1:
        return rows.reshape(1, 1, -1)
    size = scheme.group or rows.shape[1]
    missing = -rows.shape[1] % size
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
    return rows.reshape(rows.shape[0], -1, size)


def from_groups(groups: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Inverse of `to_groups`."""
    moved = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
    row = math.prod(moved[1:])
    flat = groups.reshape(moved[0], -1)[:, :row] if groups.shape[0] != 1 else groups.flatten()[: math.prod(moved)]
    weight: Tensor = flat.reshape(moved).movedim(0, axis)
    return weight


def quantize(weight: Tensor, scheme: Scheme, *, axis: int = 0, layer: str = "the weight") -> Quantized:
    """Quantize one weight; `layer` names it in errors.

    Raises `QSearchError` for weights that are not finite and for a scheme that no method here can carry out.
    """
    if scheme.family == "keep":
        raise QSearchError(f"{layer} is kept in full precision; there is nothing to quantize")
    if not torch.isfinite(weight).all():
        raise QSearchError(f"weights must be finite to be quantized; {layer} holds {int((~torch.isfinite(weight)).sum())} that are not")
    method = scheme.method or DEFAULT_METHODS[scheme.family]
    plugin: AbstractQuantizer = plugins.load("quantizers", method)
    if not plugin.supports(scheme):
        raise QSearchError(f"{method} can't make {scheme.format} ({layer}, scheme {scheme}); see `qsearch list quantizers`")
    codes, scale, zero = plugin.quantize(to_groups(weight, scheme, axis), scheme)
    return Quantized(codes, scale, zero, scheme, tuple(weight.shape), axis)
