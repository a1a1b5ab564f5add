"""Codes: what a quantizer returns, what each code stands for, and the nearest code on a grid.

One formula for every format: a weight is `scale * (level - zero)`. The level is the code itself (integers), the value of the format that the
code spells (floats, block formats), or an entry of the group's codebook. Floats with a scale of their own have levels with a top between 1
and 2, so that the scale is about the clip value and fits fp16: FP4DiT's real-valued exponent bias (arXiv 2503.15465, eq. 2) is that
scale, since b = 2^E - log2(c) + log2(2 - 2^-M) - 1 depends on the clip value c alone. Block formats keep their own levels, up to 6 for fp4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.scheme import Scheme
from .floats import FloatFormat

#: block formats -> what their codes spell; of OCP's two 6-bit and two 8-bit elements those with more mantissa, for weights
ELEMENTS = {"mxfp4": "e2m1", "mxfp6": "e2m3", "mxfp8": "e4m3", "nvfp4": "e2m1"}
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of fp16, in which scales are stored


@dataclass(frozen=True)
class Codes:
    """`codes`: uint8 [rows, groups, group], counted from 0. `scale`, `zero`: fp32 [rows, groups, 1], holding values of the type they are stored in.

    `levels`: None = a code's level is its number; [2^bits] = the values of a float format; [rows, groups, 2^bits] = codebooks.
    `unit`: one factor of all scales, 1 but for nvfp4.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor | None = None
    unit: float = 1.0

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


def element(scheme: Scheme) -> FloatFormat:
    """The float format that the codes of a float or block scheme spell."""
    return FloatFormat.named(ELEMENTS.get(scheme.format, scheme.format))


def largest(scheme: Scheme) -> float:
    """The largest level of a float or block scheme."""
    form = element(scheme)
    return form.top if scheme.family == "block" else form.top * 2.0**-form.highest


def quantize_to_grid(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, unit: float = 1.0
) -> Codes:
    """`groups` [rows, groups, group] on the grid that scale, zero and the scheme (no codebook) span, each to its nearest code."""
    if scheme.family in ("int", "uint"):
        codes = (groups / scale).add_(zero).round_().clamp_(0, 2**scheme.bits - 1)
        return Codes(codes.to(torch.uint8), scale, zero)
    form = element(scheme)
    own = 1.0 if scheme.family == "block" else 2.0**form.highest
    return Codes(
        form.encode(groups / (scale * unit) * own),
        scale,
        torch.zeros_like(scale),
        levels(scheme, groups.device),
        unit,
    )


def levels(scheme: Scheme, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [2^bits]: what each code of a float or block scheme stands for, before its scale."""
    form = element(scheme)
    return form.values(device) / (1.0 if scheme.family == "block" else 2.0**form.highest)


def qparams_from_range(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid from `low` to `high` (of one shape) for an integer or float scheme, as they are stored."""
    if scheme.family == "uint":
        top = 2**scheme.bits - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = round_to_fp16((high - low) / top)
        return scale, (-low / scale).round().clamp(0, top)
    size = torch.maximum(low.abs(), high.abs())
    if scheme.family == "int":
        half = 2 ** (scheme.bits - 1)
        scale = round_to_fp16(size / (half - 1))
        return scale, torch.full_like(scale, half)
    scale = round_to_fp16(size / largest(scheme))
    return scale, torch.zeros_like(scale)


def round_to_fp16(scale: Tensor) -> Tensor:
    """A scale as fp16 stores it, above zero."""
    return scale.clamp(min=_SMALLEST, max=_LARGEST).half().float()
