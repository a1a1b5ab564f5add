"""Codes: what a quantizer returns, what each code stands for, and the nearest code on a grid.

One formula for most formats: a weight is `scale * (level - zero)`. The level is the code itself
(integers), the value of the format that the code spells (floats, block formats), or an entry of the
group's codebook. Which of them, and the grid, is said by the format's file in `formats/`; what
several of them share is here. A format whose codes are no such thing (a trellis) returns codes of
its own, which have `values`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.scheme import Scheme
from .floats import FloatFormat
from .format import grid_of

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of fp16, in which scales are stored


class AbstractCodes(Protocol):
    """What a format's `quantize` returns: codes of one weight, or of one part of it."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        ...

    def values(self) -> Tensor:
        """fp32 [rows, groups, group], or [rows, columns]: what the codes stand for."""
        ...


@dataclass(frozen=True)
class Codes:
    """`codes`: uint8 [rows, groups, group], counted from 0. `scale`, `zero`: fp32 [rows, groups,
    1], holding values of the type they are stored in.

    `levels`: None = a code's level is its number; [2^bits] = the values of a float format; [rows,
    groups, 2^bits] = codebooks. `unit`: one factor of all scales, 1 but where a format stores one.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor | None = None
    unit: float = 1.0

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.codes.device

    def values(self) -> Tensor:
        """fp32 [rows, groups, group]: what the codes stand for."""
        if self.levels is None:
            level = self.codes.float()
        elif self.levels.ndim == 1:
            level = self.levels[self.codes.int()]
        else:
            level = self.levels.gather(-1, self.codes.long())
        return level.sub_(self.zero).mul_(
            self.scale * self.unit
        )  # in place: a large layer is in memory as few times as can be


def qparams_from_range(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid from `low` to `high` (of one shape) for a format with a grid, as
    they are stored.
    """
    return grid_of(scheme).qparams_from_range(low, high, scheme.format)


def quantize_to_grid(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, unit: float = 1.0
) -> Codes:
    """`groups` [rows, groups, group] on the grid that scale, zero and the scheme (no codebook)
    span, each to its nearest code.
    """
    return grid_of(scheme).quantize_to_grid(groups, scale, zero, scheme.format, unit)


def round_to_nearest(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group] on the grid between the ends of each group."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return quantize_to_grid(groups, *qparams_from_range(low, high, scheme), scheme)


def whole_codes(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Codes:
    """Codes that are integers from 0 to 2^bits - 1."""
    codes = (groups / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return Codes(codes.to(torch.uint8), scale, zero)


def element_codes(groups: Tensor, scale: Tensor, element: str, unit: float) -> Codes:
    """Codes of a block format, which spell the float `element`."""
    form = FloatFormat.named(element)
    codes = form.encode(groups / (scale * unit))
    return Codes(codes, scale, torch.zeros_like(scale), form.values(groups.device), unit)


def round_to_fp16(scale: Tensor) -> Tensor:
    """A scale as fp16 stores it, above zero."""
    return scale.clamp(min=_SMALLEST, max=_LARGEST).half().float()
