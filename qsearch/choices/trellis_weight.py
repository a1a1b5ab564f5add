"""A trellis-coded weight as it lies in memory: tiles, and a scale a row; decoded between load and
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsearch_kernels import trellis_ops
from qsearch_kernels.trellis_layout import packed_shape

from ..core.scheme import Scheme
from .packed_weight import AbstractPackedWeight
from .quantization import Quantized
from .trellis import STATES, TrellisCodes


class TrellisWeight(AbstractPackedWeight):
    """`codes` uint8 [row tiles, column tiles, bytes], `scale` fp16 [rows, 1]."""

    codes: Tensor
    scale: Tensor

    def __init__(self, scheme: Scheme, rows: int, columns: int, device: torch.device | str) -> None:
        super().__init__(scheme, rows, columns)
        shape = packed_shape(rows, columns, self.bits)
        self.register_buffer("codes", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(rows, 1, dtype=torch.float16, device=device))
        self.devices = frozenset(("cpu", "cuda"))

    def fill(self, quantized: Quantized) -> None:
        """Take over codes. Raises `ValueError` where a scale is no value of fp16."""
        code = quantized.code
        assert isinstance(code, TrellisCodes)
        narrow = code.scale.half()
        if not torch.equal(narrow.float(), code.scale):
            raise ValueError(
                f"{self.scheme} stores its scale as fp16; the quantizer's does not fit"
            )
        self.codes, self.scale = code.packed, narrow

    def forward(self) -> tuple[Tensor, Tensor]:
        """Tiles and scales, as a call: hooks that fetch what was offloaded hang on it."""
        return self.codes, self.scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [rows, columns] that the codes stand for."""
        codes, scale = self()
        level: Tensor = trellis_ops.decode_trellis(
            codes, self.bits, STATES, self.rows, self.columns
        )
        return level.float().mul_(scale.float()).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [..., columns] as it is times the weight."""
        codes, scale = self()
        made: Tensor = trellis_ops.linear_trellis(
            x, codes, scale.float(), self.bits, STATES, _like(bias, x)
        )
        return made

    def linear_rounded(
        self, x: Tensor, bias: Tensor | None, bits: int, low: Tensor | None, high: Tensor | None
    ) -> Tensor:
        """`x` [..., columns], rounded to `bits`, times the weight."""
        codes, scale = self()
        made: Tensor = trellis_ops.linear_trellis_rounded(
            x, codes, scale.float(), self.bits, STATES, _like(bias, x), bits, low, high
        )
        return made


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
