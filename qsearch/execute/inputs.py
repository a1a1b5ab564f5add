"""The input's side of a packed layer: transforms as they are stored, then rounding on a grid, or
the ends of the grid for a kernel.

What is stored, and what is done with it, is said by the plug-ins of the scheme's words
(`choices/transforms/`, `choices/activations/`); here is where the tensors lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from ..choices.fake_quantization import grain_plugin, rounding_of
from ..choices.input_quantizer import InputQuantizer, words_of
from ..choices.packed_weight import same_type
from ..choices.transform import AbstractPackedStep
from ..core.scheme import Scheme
from ..core.words import Buffer

Unpack = Callable[[Mapping[str, Tensor]], AbstractPackedStep]


@dataclass(frozen=True)
class Given:
    """What a packed layer multiplies.

    Attributes:
        x: the input after its transforms; rounded, unless a kernel is to do that.
        low: lower ends of the grid for a kernel, stored or (of an input in parts) each token's own;
            None: the kernel's own.
        high: upper ends.
        steps: transforms that may add something to the output, each with its own input.
    """

    x: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    steps: tuple[tuple[AbstractPackedStep, Tensor], ...] = ()

    def output(self, y: Tensor) -> Tensor:
        """The layer's output, where `y` is the packed product."""
        for step, x in reversed(self.steps):
            y = step.output(y, x)
        return y


class Input(nn.Module):
    """The input's side of `scheme` for a weight of `shape`, output channels on `axis`. Empty until
    `fill` or a state dict fills it.

    Buffers: what the scheme's transforms store, by their own names (`divisor`, `first`; a name that
        several of them
    use is numbered from the second on), and `low`, `high`: the ends of a static grid (also of an
    input in `parts`, which have a range each).
    """

    low: Tensor | None
    high: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        shape: Sequence[int],
        axis: int,
        *,
        linear: bool,
        parts: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.scheme, self.channel, self.parts = scheme, -1 if linear else 1, parts
        grain = grain_plugin(scheme)
        # Functions and not plug-ins: a module of Python can't be copied or pickled, as models are.
        self.ranges = grain.ranges
        self.rounding = rounding_of(scheme.activation) if scheme.activation else None
        #: whether each part of the input has a range of its own
        self.apart = scheme.static_input and parts and not grain.per_channel
        #: bits of an integer grid that is the same for all channels (of a part), 0 where inputs are
        #: no such integers
        zero = self.rounding is not None and self.rounding.stores_zero
        integers = scheme.integer_input and zero and not grain.per_channel
        self.bits = scheme.activation_bits if integers else 0
        #: for each transform, what makes it of its tensors, and the names that it stores -> those
        #: of the buffers
        self.transforms: list[tuple[Unpack, dict[str, str]]] = []
        #: buffer -> what lies there
        self.layout: dict[str, Buffer] = {}
        for word in words_of(scheme):
            held = word.plugin.stored(shape, axis, word.number)
            names = {name: _free(name, self.layout) for name in held}
            unpack = partial(word.plugin.unpack, shape=tuple(shape), axis=axis, number=word.number)
            self.transforms.append((unpack, names))
            self.layout |= {names[name]: buffer for name, buffer in held.items()}
        ends = grain.ends(shape[1 - axis], parts) if scheme.activation else 0
        if ends:
            self.layout["low"] = Buffer((ends,), "float32", typical=-3.0)
            self.layout["high"] = Buffer((ends,), "float32", typical=3.0)
        for name, buffer in self.layout.items():
            dtype = getattr(torch, buffer.dtype)
            self.register_buffer(name, torch.empty(buffer.shape, dtype=dtype, device=device))
        if not ends:
            self.register_buffer("low", None)
            self.register_buffer("high", None)

    def fill(self, quantizer: InputQuantizer, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Take over what calibration found.

        Args:
            quantizer: the input's transforms and ranges.
            weight: the layer's weight in full precision.
            bias: its bias.

        Returns:
            The bias with what the transforms add to it.
        """
        found: dict[str, Tensor] = {}
        stored, bias = quantizer.pack(weight, bias)
        for (_, names), held in zip(self.transforms, stored, strict=True):
            found |= {names[name]: value for name, value in held.items()}
        if self.low is not None and quantizer.inputs is not None:
            low, high = self.ranges(quantizer.inputs.low, 0, quantizer.inputs)
            found |= {"low": low.reshape(-1), "high": high.reshape(-1)}
        for name, buffer in self.layout.items():
            assert tuple(found[name].shape) == buffer.shape, (
                f"{self.scheme} stores {name} as {buffer.shape}, calibration gave "
                f"{tuple(found[name].shape)}"
            )
            setattr(self, name, found[name].to(getattr(torch, buffer.dtype)).clone())
        return bias

    def forward(self, x: Tensor, *, rounds: bool) -> Given:
        """The input of the packed product; a call, since hooks that fetch what was offloaded hang
        on it.

        `rounds`: round in floating point, what a machine computes that has no arithmetic for it; a
        weight that is kept then takes the input in its own coordinates. Else leave rounding to a
        kernel.
        """
        steps = []
        for step in self._steps():
            steps.append((step, x))
            x = step.input(x, self.channel)
        if not rounds:
            known = self.low is not None or self.parts
            low, high = self._ends(x) if known else (None, None)
            return Given(x, low, high, tuple(steps))
        if self.rounding is not None:
            low, high = self._ends(x)
            x = self.rounding.between(x.float(), low, high).to(x.dtype)
        if self.scheme.format == "keep":
            for step, _ in reversed(steps):
                x = step.restore(x, self.channel)
        return Given(x, None, None, tuple(steps))

    def restore_weight(self, weight: Tensor) -> Tensor:
        """A stored weight in the layer's own coordinates."""
        for step in reversed(self._steps()):
            weight = step.restore_weight(weight)
        return weight

    def stored_weight(self, weight: Tensor) -> Tensor:
        """Inverse of `restore_weight`. Raises `QSearchError` where a transform holds more of the
        weight than that.
        """
        for step in self._steps():
            weight = step.stored_weight(weight)
        return weight

    def _steps(self) -> list[AbstractPackedStep]:
        return [
            unpack({name: self.get_buffer(place) for name, place in names.items()})
            for unpack, names in self.transforms
        ]

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the grid for transformed `x`: stored, or its own."""
        if self.low is None or self.high is None:
            low, high = self.ranges(x, self.channel, None)
            return low.float(), high.float()
        if self.channel == -1:
            return self.low, self.high
        shape = (1, -1, *[1] * (x.ndim - 2))
        return self.low.view(shape), self.high.view(shape)

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(same_type(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]  # torch has no types for it


def _free(name: str, taken: dict[str, Buffer]) -> str:
    """A name for a buffer that no other transform has: `divisor`, `divisor2`, ..."""
    number = 1
    while (made := name if number == 1 else f"{name}{number}") in taken:
        number += 1
    return made
