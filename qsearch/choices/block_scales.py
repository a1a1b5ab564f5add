"""Block scales by choice: NVFP4 and MXFP4 with the scale that errs less, and 16 levels on int8's
grid.

`chosen`: e2m1 has no value between 4 and 6. A block whose largest weight stands on 6 has steps of 2
at its top; on 4, steps of 1, and all steps half as wide again. Each block takes the one with the
smaller squared error ("four over six", arXiv 2512.02010). The tensor scale leaves room for the
larger one: the largest block's scale is 256 on 6 and 384 on 4, both e4m3 values. MXFP4's scales are
powers of two, so that a block's largest weight stands wherever it falls: one of three neighbouring
powers is taken.

`codebook_on_int8`, cb4: a weight is row scale * round(level[code] * block scale), where the 16
levels are fixed whole numbers up to 127 and block scales e4m3 numbers up to 1 for 16 weights. What
is rounded is an int8, with one scale a row: cb4 is stored like NVFP4 and multiplied like int8 (as
comfy-kitchen's asym_w4a8_int8, issue 90 there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import QSearchError
from ..core.scheme import Scheme
from .codes import Codes, element_codes, round_to_fp16
from .floats import FloatFormat
from .formats import microscaling, nvfp4

_FP8 = FloatFormat.named("e4m3")
_ROOM = 256.0  # of e4m3's 448, that the scale of the largest block takes with its maximum on 6
CB4_GROUP = 16
#: Lloyd-Max levels of Gaussian blocks of 16 with chosen scales, in whole numbers: `train_levels`
CB4_LEVELS = (-127, -96, -74, -58, -44, -32, -19, -6, 6, 19, 32, 44, 58, 74, 96, 127)
#: block scales that are tried, over the one that puts the block's largest weight on the last level
_TRIED = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)


def chosen(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 groups [rows, groups, group] for `nvfp4` or `mxfp4`.

    Raises `QSearchError` for other formats.
    """
    if scheme.format == "nvfp4":
        largest = groups.abs().amax(-1, keepdim=True)
        unit = max(float(largest.max()) / (6.0 * _ROOM), 2.0**-126)
        tried = [_fp8(largest / (top * unit)) for top in (6.0, 4.0)]
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


def codebook_on_int8(groups: Tensor, table: Tensor | None = None) -> Codes:
    """cb4 codes of fp32 groups [rows, groups, 16]; `levels` [rows, groups, 16] are whole numbers.

    `table`: other 16 levels than `CB4_LEVELS`.
    """
    level = torch.tensor(CB4_LEVELS, dtype=torch.float32) if table is None else table
    level = level.to(groups.device)
    row = round_to_fp16(groups.abs().amax((1, 2), keepdim=True) / 127)
    whole = groups / row
    full = whole.abs().amax(-1, keepdim=True) / 127
    best, error = None, torch.full_like(full, torch.inf)
    for share in _TRIED:
        scale = _fp8(full * share * 256) / 256  # e4m3's normal numbers reach down to 2**-6
        made = _coded(whole, (level * scale).round())
        off = (made.values() - whole).square().sum(-1, keepdim=True)
        if best is None:
            best, error = made, off
        else:
            better = off < error
            best = Codes(
                torch.where(better, made.codes, best.codes), made.scale, made.zero,
                torch.where(better, _table(made), _table(best)),
            )  # fmt: skip
            error = torch.minimum(error, off)
    assert best is not None
    return Codes(best.codes, row.expand_as(full).contiguous(), torch.zeros_like(full), best.levels)


def cb4_stored_bits(rows: int, columns: int) -> int:
    """Bits in memory: 4 a weight, 8 for each block of 16 in a row, 16 a row."""
    return 4 * rows * columns + 8 * rows * -(-columns // CB4_GROUP) + 16 * rows


def train_levels(seed: int = 0, blocks: int = 40000, rounds: int = 30) -> Tensor:
    """fp32 [16]: levels that leave Gaussian blocks least squared error, symmetric, largest 127."""
    dice = torch.Generator().manual_seed(seed)
    groups = torch.randn(1, blocks, CB4_GROUP, generator=dice)
    level = torch.linspace(-127, 127, 16)
    for _ in range(rounds):
        made = codebook_on_int8(groups, level)
        share = _table(made)[..., -1:] / 127  # the block's scale, as far as whole numbers say
        power = torch.zeros(16).index_add_(
            0, made.codes.flatten().long(), (share.expand_as(groups) ** 2).flatten()
        )
        cross = torch.zeros(16).index_add_(
            0, made.codes.flatten().long(), (groups / made.scale * share).flatten()
        )
        level = cross / power.clamp(min=1e-12)
        level = (level - level.flip(0)) / 2
        level = level * 127 / level[-1]
    return level


def _table(codes: Codes) -> Tensor:
    assert codes.levels is not None
    return codes.levels


def _coded(whole: Tensor, levels: Tensor) -> Codes:
    """The nearest of each block's levels [rows, groups, 16], which ascend."""
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    codes = torch.searchsorted(middle.contiguous(), whole.contiguous())
    one = torch.ones_like(whole[..., :1])
    return Codes(codes.to(torch.uint8), one, torch.zeros_like(one), levels)


def _fp8(scale: Tensor) -> Tensor:
    """Scales as e4m3 stores them, the smallest for zero."""
    return _FP8.values(scale.device)[_FP8.encode(scale).clamp(min=1).int()]


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
