"""Weight: the tensors and numbers that a packed weight consists of, as every operation takes
them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import layout, reference

_CHUNK = 2**18  # weights that are widened at a time: they stay in a core's cache


class Weight(NamedTuple):
    """`scale * (level - zero)` for each of rows x `columns`; see `reference.py`.

    `codes`: in the layout of `layout.py`, uint8 [rows, row bytes], or int8 [rows, columns] for
    integers of 8 bits. `scale`: [rows, groups] (or [1, 1]). `zero`: the same, or None where
    `offset` is the zero of all. `levels`: None, [2**bits], or [rows, groups, 2**bits]. `group`: as
    in `reference.dequantize`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: float
    levels: Tensor | None
    bits: int
    columns: int
    group: int

    def part(self, begin: int, end: int) -> Weight:
        """Rows from `begin` to `end`; all rows share what has one row."""
        one = slice(None) if self.group == -1 else slice(begin, end)
        levels = self.levels if self.levels is None or self.levels.ndim == 1 else self.levels[one]
        return self._replace(
            codes=self.codes[begin:end],
            scale=self.scale[one],
            zero=None if self.zero is None else self.zero[one],
            levels=levels,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [rows, columns] in `dtype`, computed in fp32 some rows at a time."""
        rows = len(self.codes)
        out = torch.empty(rows, self.columns, dtype=dtype, device=self.codes.device)
        step = (
            max(1, _CHUNK // max(1, self.columns))
            if self.codes.device.type == "cpu"
            else max(1, rows)
        )
        for begin in range(0, rows, step):
            part = self.part(begin, begin + step)
            codes = layout.unpack(part.codes, self.bits, self.columns)
            zero = self.offset if part.zero is None else part.zero
            out[begin : begin + step] = reference.dequantize(
                codes, part.scale.float(), zero, self.group, part.levels
            )
        return out
