"""An offset and a scale for each input channel: (x - offset) / scale, folded into the weight and
the bias.

W x = (W s) ((x - z) / s) + W z: W s and (x - z) / s are rounded. What is left of the offset, (W -
Q(W s) / s) z, is a bias. Shared by the transforms that smooth inputs (`~balance`, `~migrate` and
others).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import QSearchError
from .statistics import LayerInputs
from .transform import AbstractPackedStep, AbstractStep, Product

_SMALLEST = 2.0**-14  # of fp16's normal numbers


def _channels(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """[channels] in a shape that spreads over `x`, whose channels lie on `axis`."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.view(shape)


@dataclass(frozen=True)
class ChannelAffine(AbstractStep):
    """An offset and a scale for each input channel [channels], as fp16 stores them; None for none.
    Make it with `of`.

    `stored_as`: the name of the offset among what a packed layer stores.
    """

    offset: Tensor | None = None
    scale: Tensor | None = None
    stored_as: str = "offset"

    adds_output: ClassVar[bool] = True

    @staticmethod
    def of(
        *,
        offset: Tensor | None = None,
        scale: Tensor | None = None,
        stored_as: str = "offset",
    ) -> ChannelAffine:
        """The step for an offset, a scale or both, rounded to what is stored: fp16, scales above
        zero.
        """
        return ChannelAffine(
            None if offset is None else offset.half().float(),
            None if scale is None else scale.half().float().clamp(min=_SMALLEST),
            stored_as,
        )

    def statistics(self, inputs: LayerInputs) -> LayerInputs:
        """Statistics of (x - offset) / scale."""
        offset = torch.zeros_like(inputs.low) if self.offset is None else self.offset
        scale = torch.ones_like(inputs.low) if self.scale is None else self.scale
        return inputs.moved(offset, scale)

    def input(self, x: Tensor, axis: int) -> Tensor:
        """(x - offset) / scale, in fp32."""
        x = x.float()
        if self.offset is not None:
            x = x - _channels(self.offset, x, axis)
        return x if self.scale is None else x / _channels(self.scale, x, axis)

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """x * scale + offset."""
        if self.scale is not None:
            x = x * _channels(self.scale, x, axis)
        return x if self.offset is None else x + _channels(self.offset, x, axis)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight's columns times the scale."""
        return weight if self.scale is None else weight * _channels(self.scale, weight, 1)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The weight's columns over the scale."""
        return weight if self.scale is None else weight / _channels(self.scale, weight, 1)

    def output(self, y: Tensor, product: Product) -> Tensor:
        """With what the offset leaves to the bias."""
        if self.offset is None:
            return y
        left = F.linear(self.offset.to(product.full), product.full - product.weight)
        return y + left.to(y.dtype)

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        """Offset and divisor; the bias with what the offset takes away."""
        stored = {self.stored_as: self.offset, "divisor": self.scale}
        bias = product.bias
        if self.offset is not None:
            bias = F.linear(self.offset.to(product.full), product.full, bias)
        return {name: value for name, value in stored.items() if value is not None}, bias


@dataclass(frozen=True)
class PackedAffine(AbstractPackedStep):
    """A stored offset and divisor for each input channel [channels]; None for none."""

    offset: Tensor | None = None
    divisor: Tensor | None = None

    @staticmethod
    def of(stored: Mapping[str, Tensor], stored_as: str = "offset") -> PackedAffine:
        """From what a packed layer stores."""
        return PackedAffine(stored.get(stored_as), stored.get("divisor"))

    def input(self, x: Tensor, axis: int) -> Tensor:
        """(x - offset) / divisor, in fp32."""
        x = x.float()
        if self.offset is not None:
            x = x - _channels(self.offset.float(), x, axis)
        return x if self.divisor is None else x / _channels(self.divisor.float(), x, axis)

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """x * divisor."""
        return x if self.divisor is None else x * _channels(self.divisor.float(), x, axis)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The weight's columns over the divisor."""
        if self.divisor is None:
            return weight
        return weight / _channels(self.divisor.float(), weight, 1)

    def stored_weight(self, weight: Tensor) -> Tensor:
        """The weight's columns times the divisor. Refused with an offset, whose part of the bias
        was computed with the weight of before.
        """
        if self.offset is not None:
            raise QSearchError(
                "a layer whose inputs are shifted holds the shift's product in its bias, which "
                "another weight would change"
            )
        if self.divisor is None:
            return weight
        return weight * _channels(self.divisor.float(), weight, 1)
