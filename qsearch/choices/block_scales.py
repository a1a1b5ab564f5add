"""Block scales by choice: NVFP4 and MXFP4 with the scale that errs less.

e2m1 has no value between 4 and 6. A block whose largest weight stands on 6 has steps of 2
at its top; on 4, steps of 1, and all steps half as wide again. Each block takes the one with the
smaller squared error ("four over six", arXiv 2512.02010). The tensor scale leaves room for the
larger one: the largest block's scale is 256 on 6 and 384 on 4, both e4m3 values. MXFP4's scales are
powers of two, so that a block's largest weight stands wherever it falls: one of three neighbouring
powers is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import QSearchError
from ..core.scheme import Scheme
from .codes import Codes, element_codes
from .floats import FloatFormat, fp8_scales
from .formats import microscaling, nvfp4

_ROOM = 256.0  # of e4m3's 448, that the scale of the largest block takes with its maximum on 6


def chosen(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group] for `nvfp4` or `mxfp4`.

    Raises `QSearchError` for other formats.
    """
    if scheme.format == "nvfp4":
        largest = groups.abs().amax(-1, keepdim=True)
        unit = max(float(largest.max()) / (6.0 * _ROOM), 2.0**-126)
        tried = [fp8_scales(largest / (top * unit)) for top in (6.0, 4.0)]
        return _least(groups, tried, nvfp4.ELEMENT, unit)
    if scheme.format == "mxfp4":
        element = microscaling.ELEMENTS[scheme.format]
        largest = groups.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(largest).exponent - 1 - FloatFormat.named(element).highest
        exponent = torch.where(largest > 0, exponent, -126)
        tried = [
            torch.exp2((exponent + more).clamp(-127, 127).double()).float() for more in (0, 1, -1)
        ]
        return _least(groups, tried, element, 1.0)
    raise QSearchError(f"block scales are chosen for nvfp4 and mxfp4; given {scheme.format}")


def _least(groups: Tensor, tried: list[Tensor], element: str, unit: float) -> Codes:
    """With the scale of each block, of those `tried`, that leaves the least squared error."""
    best, error = None, None
    for scale in tried:
        made = element_codes(groups, scale, element, unit)
        off = (made.values() - groups).square().sum(-1, keepdim=True)
        if best is None or error is None:
            best, error = made, off
            continue
        better = off < error
        best = Codes(
            torch.where(better, made.codes, best.codes), torch.where(better, scale, best.scale),
            best.zero, best.levels, unit,
        )  # fmt: skip
        error = torch.minimum(error, off)
    assert best is not None
    return best
