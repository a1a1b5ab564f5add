"""NVIDIA's block format, `nvfp4`: blocks of 16 values of e2m1, an e4m3 scale a block and an fp32
scale a tensor.

The tensor scale puts the largest block scale at e4m3's largest value; block scales are then rounded
to e4m3. Inputs (`+anvfp4`) have block scales alone, so that a token does not depend on others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.format_words import groups_of
from ...core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..codes import Codes
    from ..packed_weight import AbstractPackedWeight

family = "block"
words = ("nvfp4",)
inputs = {"nvfp4": "nvfp4"}
sizes = ""
multiplied_as = "float"
stores_zero = False
follows_range = True
has_grid = False
ELEMENT = "e2m1"
_BLOCK, _SCALE_BITS, _TENSOR_BITS = 16, 8, 32


def bits(word: str) -> int:
    """Of e2m1."""
    return 4


def group(word: str) -> int:
    """A block."""
    return _BLOCK


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, a scale a block, and one for the whole weight."""
    blocks = groups_of(rows, columns, group)
    return bits(word) * rows * columns + blocks * _SCALE_BITS + _TENSOR_BITS


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes of fp32 blocks [rows, blocks, 16]."""
    import torch

    from ..floats import FloatFormat

    scales, top = FloatFormat.named("e4m3"), FloatFormat.named(ELEMENT).top
    size = groups.abs().amax(-1, keepdim=True)
    unit = max(float(size.max()) / (top * scales.top), 2.0**-126)
    scale = _scale(size / (top * unit))
    return quantize_to_grid(groups, scale, torch.zeros_like(scale), scheme.format, unit)


def qparams_from_range(low: Tensor, high: Tensor, word: str) -> tuple[Tensor, Tensor]:
    """The e4m3 scale of each block of an input, from its ends; zero is 0."""
    import torch

    from ..floats import FloatFormat

    scale = _scale(torch.maximum(low.abs(), high.abs()) / FloatFormat.named(ELEMENT).top)
    return scale, torch.zeros_like(scale)


def _scale(wanted: Tensor) -> Tensor:
    """The nearest e4m3 scales; a block of zeros gets the smallest, not none."""
    from ..floats import FloatFormat

    scales = FloatFormat.named("e4m3")
    return scales.values(wanted.device)[scales.encode(wanted).clamp(min=1).int()]


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, word: str) -> Tensor:
    """What `quantize_to_grid` makes of `x`, in floating point."""
    return quantize_to_grid(x, scale, zero, word).values()


def quantize_to_grid(
    groups: Tensor, scale: Tensor, zero: Tensor, word: str, unit: float = 1.0
) -> Codes:
    """Each number to its nearest code."""
    from ..codes import element_codes

    return element_codes(groups, scale, ELEMENT, unit)


def level_table(word: str, device: torch.device | str) -> Tensor:
    """fp32 [16]: what each code stands for before its scale."""
    from ..floats import FloatFormat

    return FloatFormat.named(ELEMENT).values(device)


def element(word: str) -> str:
    """The float format that a code spells."""
    return ELEMENT


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Codes, block scales as bytes, and the tensor's scale."""
    from ..packed_weight import Layout, PackedWeight

    layout = Layout(scale="float8_e4m3fn", unit=True, table=level_table(scheme.format, "cpu"))
    return PackedWeight(scheme, rows, columns, device, layout)
