"""Codebooks, `km2` to `km4`: each group has its own 2^b values, chosen by k-means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.format_words import SIDE_BITS, groups_of
from ...core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..codes import Codes
    from ..packed_weight import AbstractPackedWeight

family = "codebook"
words = ("km2", "km3", "km4")
inputs: dict[str, str] = {}
sizes = "tcg"
multiplied_as = ""  # entries are any numbers: weights are widened as they are read
stores_zero = False
follows_range = False
has_grid = False


def bits(word: str) -> int:
    """The number in the word."""
    return int(word.removeprefix("km"))


def group(word: str) -> int:
    """A channel, where a scheme says nothing."""
    return 0


def stored_bits(word: str, rows: int, columns: int, group: int) -> int:
    """Codes, and a codebook a group."""
    held = groups_of(rows, columns, group) * (SIDE_BITS << bits(word))
    return bits(word) * rows * columns + held


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes and codebooks of fp32 groups [rows, groups, group], by k-means."""
    from ..quantizers import kmeans

    return kmeans.quantize(groups, scheme)


def packed(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str
) -> AbstractPackedWeight | None:
    """Codes and codebooks."""
    from ..packed_weight import Layout, PackedWeight

    return PackedWeight(scheme, rows, columns, device, Layout(scale="", codebook=True))
