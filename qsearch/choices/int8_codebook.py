"""Codes of `cb4`: 16 fixed Lloyd-Max levels whose products with block scales are rounded to int8,
and the weight as it lies in memory.

Block scales are e4m3 numbers up to 1, of which those are tried that put a block's largest weight on
the last level or above it; the one with the least squared error stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsearch_kernels import layout, ops
from qsearch_kernels.weight import Weight

from ..core.scheme import Scheme
from .codes import round_to_fp16
from .floats import fp8_scales
from .packed_weight import KernelWeight
from .quantization import Quantized

GROUP = 16
#: Lloyd-Max levels of Gaussian blocks of 16 with chosen scales, in whole numbers: `train_levels`
LEVELS = (-127, -96, -74, -58, -44, -32, -19, -6, 6, 19, 32, 44, 58, 74, 96, 127)
#: block scales are e4m3 numbers over this: normal ones down to 2**-14
UNIT = 256.0
#: block scales that are tried, over the one that puts the block's largest weight on the last level
_TRIED = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)


@dataclass(frozen=True)
class LevelCodes:
    """Codes of one weight: row * round(level[code] * block).

    Attributes:
        codes: uint8 [rows, groups, 16], from 0 to 15.
        block: fp32 [rows, groups, 1], an e4m3 number over `UNIT`.
        row: fp32 [rows, 1, 1], a value of fp16.
        levels: fp32 [16].
    """

    codes: Tensor
    block: Tensor
    row: Tensor
    levels: Tensor

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.codes.device

    def whole(self) -> Tensor:
        """fp32 [rows, groups, 16]: the int8 that each code stands for before the row's scale."""
        return (self.levels[self.codes.int()] * self.block).round_()

    def values(self) -> Tensor:
        """fp32 [rows, groups, 16]: what the codes stand for."""
        return self.whole().mul_(self.row)


def level_codes(groups: Tensor, table: Tensor | None = None) -> LevelCodes:
    """Codes of fp32 blocks.

    Args:
        groups: fp32 [rows, groups, 16].
        table: fp32 [16], other levels than `LEVELS`, ascending, of at most 127.

    Returns:
        The codes.
    """
    level = torch.tensor(LEVELS, dtype=torch.float32) if table is None else table
    level = level.to(groups.device)
    row = round_to_fp16(groups.abs().amax((1, 2), keepdim=True) / 127)
    whole = groups / row
    full = whole.abs().amax(-1, keepdim=True) / 127
    best: LevelCodes | None = None
    least = torch.full_like(full, torch.inf)
    for share in _TRIED:
        block = fp8_scales(full * share * UNIT) / UNIT
        made = LevelCodes(_nearest(whole, (level * block).round()), block, row, level)
        off = (made.whole() - whole).square_().sum(-1, keepdim=True)
        if best is not None:
            better = off < least
            codes = torch.where(better, made.codes, best.codes)
            made = LevelCodes(codes, torch.where(better, block, best.block), row, level)
        best, least = made, torch.minimum(least, off)
    assert best is not None
    return best


def train_levels(seed: int = 0, blocks: int = 40000, rounds: int = 30) -> Tensor:
    """fp32 [16]: levels that leave Gaussian blocks least squared error, symmetric, largest 127."""
    dice = torch.Generator().manual_seed(seed)
    groups = torch.randn(1, blocks, GROUP, generator=dice)
    level = torch.linspace(-127, 127, 16)
    for _ in range(rounds):
        made = level_codes(groups, level)
        place, share = made.codes.flatten().long(), made.block.expand_as(groups)
        power = torch.zeros(16).index_add_(0, place, (share**2).flatten())
        cross = torch.zeros(16).index_add_(0, place, (groups / made.row * share).flatten())
        level = cross / power.clamp(min=1e-12)
        level = (level - level.flip(0)) / 2
        level = level * 127 / level[-1]
    return level


class LevelWeight(KernelWeight):
    """`codes` uint8 [rows, row bytes], `block` uint8 [rows, blocks] (e4m3), `row` fp16 [rows, 1].

    Products see the int8 that the codes stand for, with a scale a row: they are those of `int8-c`,
    and the codes are widened to bytes at each call.
    """

    codes: Tensor
    block: Tensor
    row: Tensor
    levels: Tensor

    def __init__(self, scheme: Scheme, rows: int, columns: int, device: torch.device | str) -> None:
        super().__init__(scheme, rows, columns)
        shapes = {
            "codes": ((rows, layout.row_bytes(columns, 4)), torch.uint8),
            "block": ((rows, -(-columns // GROUP)), torch.uint8),
            "row": ((rows, 1), torch.float16),
        }
        for name, (shape, kind) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        table = torch.tensor(LEVELS, dtype=torch.float32)
        table = table if str(device) == "meta" else table.to(device)
        self.register_buffer("levels", table, persistent=False)  # part of the format
        self.devices = ops.devices(
            self._of(torch.empty(rows, columns, dtype=torch.int8, device="meta"))
        )

    def fill(self, quantized: Quantized) -> None:
        """Take over codes. Raises `ValueError` where a scale is no value of the type that stores
        it.
        """
        code = quantized.code
        assert isinstance(code, LevelCodes)
        self.codes = layout.pack(code.codes.reshape(self.rows, -1)[:, : self.columns], 4)
        self.block = _stored(code.block[..., 0] * UNIT, torch.float8_e4m3fn).view(torch.uint8)
        self.row = _stored(code.row[..., 0], torch.float16)

    def forward(self) -> Weight:
        """Bytes and a scale a row, as the products take them."""
        codes = layout.unpack(self.codes, 4, self.columns)
        block = self.block.view(torch.float8_e4m3fn).float() / UNIT
        level = self.levels[codes.int()]
        level *= block.repeat_interleave(GROUP, 1)[:, : self.columns]
        return self._of(level.round_().to(torch.int8))

    def _of(self, level: Tensor) -> Weight:
        return Weight(level, self.row, None, 128.0, None, 8, self.columns, 0)


def _nearest(whole: Tensor, levels: Tensor) -> Tensor:
    """uint8: the nearest of each block's levels [rows, groups, 16], which ascend."""
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    return torch.searchsorted(middle.contiguous(), whole.contiguous()).to(torch.uint8)


def _stored(value: Tensor, kind: torch.dtype) -> Tensor:
    narrow = value.to(kind)
    if not torch.equal(narrow.float(), value):
        raise ValueError(f"cb4 stores scales as {kind}; the quantizer's do not fit")
    return narrow
