"""Rotation of input and weight by a Hadamard matrix, in groups of channels: outliers spread over
their group before rounding.

W x = (W R) (R x) with R symmetric and orthogonal (`choices/hadamard.py`). The weight is turned
once, the input at every call; nothing is stored. `~rotate` takes the largest group of 256, 64 or 16
channels that divides the layer's, `~rotate64` this one. QuaRot (arXiv 2404.00456, section 4)
rotates language models, ConvRot (arXiv 2512.03673, section 3) diffusion models in groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...core.words import Buffer, Needs, Number, Stage
from ..transform import AbstractPackedStep, AbstractStep, Site

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics import LayerInputs

stage = Stage.ROTATION
number = Number("the channels of a group, 16, 64 or 256, 0 for the largest that divides", 0, 256, 0)
scales_weight = True
unseen = ""
needs = Needs.NOTHING
needs_linear = False
adds_bias = False


def stored(shape: Sequence[int], axis: int, number: int) -> dict[str, Buffer]:
    """Nothing: the matrix follows from the channels. Raises `QSearchError` where no group divides
    them.
    """
    from ..hadamard import group_of

    group_of(shape[1 - axis], number)
    return {}


@dataclass(frozen=True)
class Rotation(AbstractStep):
    """A rotation of groups of `group` channels."""

    group: int

    def input(self, x: Tensor, axis: int) -> Tensor:
        """R x."""
        from ..hadamard import rotated

        return rotated(x, self.group, axis)

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """R is its own inverse."""
        return self.input(x, axis)

    def weight(self, weight: Tensor) -> Tensor:
        """W R."""
        return self.input(weight, 1)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """R is its own inverse."""
        return self.input(weight, 1)

    def statistics(self, inputs: LayerInputs) -> LayerInputs:
        """Means and moments turned; ranges by the rows that were kept."""
        taps = len(inputs.mean) // len(inputs.low)

        def columns(x: Tensor) -> Tensor:  # channels times taps, the channel outermost
            return self.input(x.unflatten(-1, (-1, taps)), -2).flatten(-2)

        rows = columns(inputs.rows)
        seen = rows.unflatten(-1, (-1, taps))
        low, high = seen.amin((0, 2)), seen.amax((0, 2))
        moments = inputs.moments
        if moments is not None:
            moments = columns(columns(moments).mT).mT
        return replace(
            inputs,
            low=low,
            high=high,
            middle=self.input(inputs.middle, -1),
            mean=columns(inputs.mean),
            rows=rows,
            moments=moments,
        )


class PackedRotation(AbstractPackedStep):
    """A rotation at run time."""

    def __init__(self, group: int) -> None:
        self.group = group

    def input(self, x: Tensor, axis: int) -> Tensor:
        """R x."""
        return Rotation(self.group).input(x, axis)

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """R is its own inverse."""
        return self.input(x, axis)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """W in the coordinates of x."""
        return self.input(weight, 1)

    def stored_weight(self, weight: Tensor) -> Tensor:
        """R is its own inverse."""
        return self.input(weight, 1)


def fit(site: Site) -> AbstractStep:
    """The group for a layer. Raises `QSearchError` where none divides its channels."""
    from ..hadamard import group_of

    return Rotation(group_of(site.weight.shape[1], site.number))


def unpack(
    stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
) -> AbstractPackedStep:
    """The rotation of the layer's channels."""
    from ..hadamard import group_of

    return PackedRotation(group_of(shape[1 - axis], number))
