"""A shift and a scale for each input channel: (x - shift) / scale, folded into the weight and the bias.

W x = (W s) ((x - z) / s) + W z: W s and (x - z) / s are rounded. What is left of the shift, (W - Q(W s) / s) z, is a bias.
Shared by the transforms that smooth inputs (`~balance`, `~shift`, `~migrate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """A shift and a scale for each input channel [channels], as fp16 stores them; None for none. Make it with `of`."""

    shift: Tensor | None = None
    scale: Tensor | None = None

    adds_output: ClassVar[bool] = True

    @staticmethod
    def of(*, shift: Tensor | None = None, scale: Tensor | None = None) -> ChannelAffine:
        """The step for a shift, a scale or both, rounded to what is stored: fp16, scales above zero."""
        return ChannelAffine(
            None if shift is None else shift.half().float(),
            None if scale is None else scale.half().float().clamp(min=_SMALLEST),
        )

    def statistics(self, inputs: LayerInputs) -> LayerInputs:
        """Statistics of (x - shift) / scale."""
        shift = torch.zeros_like(inputs.low) if self.shift is None else self.shift
        scale = torch.ones_like(inputs.low) if self.scale is None else self.scale
        return inputs.moved(shift, scale)

    def input(self, x: Tensor, axis: int) -> Tensor:
        """(x - shift) / scale, in fp32."""
        x = x.float()
        if self.shift is not None:
            x = x - _channels(self.shift, x, axis)
        return x if self.scale is None else x / _channels(self.scale, x, axis)

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """x * scale + shift."""
        if self.scale is not None:
            x = x * _channels(self.scale, x, axis)
        return x if self.shift is None else x + _channels(self.shift, x, axis)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight's columns times the scale."""
        return weight if self.scale is None else weight * _channels(self.scale, weight, 1)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The weight's columns over the scale."""
        return weight if self.scale is None else weight / _channels(self.scale, weight, 1)

    def output(self, y: Tensor, product: Product) -> Tensor:
        """With what the shift leaves to the bias."""
        if self.shift is None:
            return y
        left = F.linear(self.shift.to(product.full), product.full - product.weight)
        return y + left.to(y.dtype)

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        """Shift and divisor; the bias with what the shift takes away."""
        stored = {"shift": self.shift, "divisor": self.scale}
        bias = product.bias
        if self.shift is not None:
            bias = F.linear(self.shift.to(product.full), product.full, bias)
        return {name: value for name, value in stored.items() if value is not None}, bias


@dataclass(frozen=True)
class PackedAffine(AbstractPackedStep):
    """A stored shift and divisor for each input channel [channels]; None for none."""

    shift: Tensor | None = None
    divisor: Tensor | None = None

    @staticmethod
    def of(stored: Mapping[str, Tensor]) -> PackedAffine:
        """From what a packed layer stores."""
        return PackedAffine(stored.get("shift"), stored.get("divisor"))

    def input(self, x: Tensor, axis: int) -> Tensor:
        """(x - shift) / divisor, in fp32."""
        x = x.float()
        if self.shift is not None:
            x = x - _channels(self.shift.float(), x, axis)
        return x if self.divisor is None else x / _channels(self.divisor.float(), x, axis)

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """x * divisor."""
        return x if self.divisor is None else x * _channels(self.divisor.float(), x, axis)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The weight's columns over the divisor."""
        if self.divisor is None:
            return weight
        return weight / _channels(self.divisor.float(), weight, 1)
