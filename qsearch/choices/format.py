"""Formats of weights: what a plug-in in `formats/` provides, and the plug-in of a scheme.

A format owns its words and its price (`core.format_words.FormatWord`), how a weight becomes codes,
and how codes lie in memory. Methods in `quantizers/` choose codes better than to nearest; they ask
the format for its grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from ..core.errors import QSearchError
from ..core.format_words import FormatWord, format_word
from ..core.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .codes import AbstractCodes, Codes
    from .packed_weight import AbstractPackedWeight


class AbstractFormat(FormatWord, Protocol):
    """What a module in `formats/` provides. Its contract is `qsearch.testing.FormatContract`.

    Constants, besides those that the grammar reads:
        stores_zero: whether a group has a zero point that a method may choose (HQQ).
        follows_range: whether codes follow from the ends of each group alone, what `@minmax` names.
        has_grid: whether the scale of a group may be any number of fp16, so that methods may choose
            it: then it is an `AbstractGridFormat`.
    """

    stores_zero: bool
    follows_range: bool
    has_grid: bool

    def quantize(self, groups: Tensor, scheme: Scheme) -> AbstractCodes:
        """Codes of fp32 groups [rows, groups, group], where a scheme names no method; needs no
        data.
        """
        ...

    def packed(
        self, scheme: Scheme, rows: int, columns: int, device: torch.device | str
    ) -> AbstractPackedWeight | None:
        """An empty packed weight [rows, columns]; None where there is none: then `apply` refuses
        the scheme by name.
        """
        ...


class AbstractInputFormat(AbstractFormat, Protocol):
    """A format that inputs may have too: one of `inputs`."""

    def qparams_from_range(self, low: Tensor, high: Tensor, word: str) -> tuple[Tensor, Tensor]:
        """Scale and zero of the grid from `low` to `high` (of one shape), as they are stored."""
        ...

    def round_to_grid(self, x: Tensor, scale: Tensor, zero: Tensor, word: str) -> Tensor:
        """What codes of `x` stand for, in floating point; `scale` and `zero` spread over it."""
        ...


class AbstractGridFormat(AbstractInputFormat, Protocol):
    """A format whose groups lie on a grid that any scale (and zero) spans."""

    def quantize_to_grid(
        self, groups: Tensor, scale: Tensor, zero: Tensor, word: str, unit: float = 1.0
    ) -> Codes:
        """Each number of [rows, groups, group] to its nearest code."""
        ...

    def level_ends(self, word: str, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of the grid in units of the scale, less the zero."""
        ...

    def level_table(self, word: str, device: torch.device | str) -> Tensor | None:
        """fp32 [2^bits]: what each code stands for in units of the scale; None where it is the
        code's number.
        """
        ...


class AbstractElementFormat(AbstractFormat, Protocol):
    """A format whose codes spell small floats."""

    def element(self, word: str) -> str:
        """The float that a code spells, e.g. "e2m1"."""
        ...


def format_of(scheme: Scheme) -> AbstractFormat:
    """The plug-in of a scheme's format. Raises `QSearchError` for `keep`, which has none."""
    found = format_word(scheme.format)
    if found is None:
        raise QSearchError(f"{scheme} stores a weight as it is; there is nothing to quantize")
    return cast(AbstractFormat, found)


def grid_of(scheme: Scheme) -> AbstractGridFormat:
    """The plug-in of a format with a grid. Raises `QSearchError` for another."""
    found = format_of(scheme)
    if not found.has_grid:
        raise QSearchError(f"{scheme.format} has no grid whose scale can be chosen ({scheme})")
    return cast(AbstractGridFormat, found)


def input_grid_of(scheme: Scheme) -> AbstractInputFormat:
    """The plug-in of a format that inputs may have."""
    return cast(AbstractInputFormat, format_of(scheme))


def element_of(scheme: Scheme) -> str:
    """The small float that a code of the scheme spells: of float and block formats."""
    return cast(AbstractElementFormat, format_of(scheme)).element(scheme.format)


def has_grid(scheme: Scheme) -> bool:
    """Whether a scheme's format has a grid whose scale may be any number."""
    return scheme.format != "keep" and format_of(scheme).has_grid
