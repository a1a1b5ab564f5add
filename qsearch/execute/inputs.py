"""What a plan does to a layer's input, as it is stored and run: moved by a transform, rounded on a grid, a first token answered beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..measure.activations import tensor
from ..measure.treatment import Treatment, rounded_between
from .packing import same_type

Step = Literal["moved", "ends", "rounded", "answered"]


class Input(nn.Module):
    """The input's side of `scheme`, for `channels` input channels and `outputs` output channels. Empty until a treatment or a state dict fills it.

    Buffers, each only where the scheme has it: `shift`, `divisor` [channels]; `low`, `high`, the ends of a static grid, [1] or [channels] (also of an input
    in `parts`, which have a range each); `first`: the output [outputs] of the token that is computed beforehand.
    """

    shift: Tensor | None
    divisor: Tensor | None
    low: Tensor | None
    high: Tensor | None
    first: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        channels: int,
        outputs: int,
        *,
        linear: bool,
        parts: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.scheme, self.linear = scheme, linear
        #: whether each part of the input has a range of its own
        self.apart = scheme.grain == "tensor" and parts
        #: bits of an integer grid that is the same for all channels (of a part), 0 where activations are no such integers
        self.bits = (
            int(scheme.activation)
            if scheme.activation.isdigit() and scheme.grain != "channel"
            else 0
        )
        words = [
            transform.rstrip("0123456789") for transform in scheme.transforms if transform != "bos"
        ]
        scales = [word for word in words if word != "shift"]
        static = bool(scheme.activation) and scheme.grain != "token"
        ends = channels if scheme.grain == "channel" or self.apart else 1
        for name, size, there in (
            ("shift", channels, "shift" in words),
            ("divisor", channels, bool(scales)),
            ("low", ends, static),
            ("high", ends, static),
            ("first", outputs, "bos" in scheme.transforms),
        ):
            # What transforms find are values of fp16; a product of two, or a shift times the scale before it, is none.
            half = (
                name == "first"
                or (name == "divisor" and len(scales) == 1)
                or (name == "shift" and words[:1] == ["shift"] and words.count("shift") == 1)
            )
            self.register_buffer(
                name,
                torch.empty(size, dtype=torch.float16 if half else torch.float32, device=device)
                if there
                else None,
            )

    def fill(self, treatment: Treatment, token: Tensor | None) -> None:
        """Take over what calibration found; `token`: the output of the first token."""
        found = {"shift": treatment.shift, "divisor": treatment.scale, "first": token}
        if treatment.inputs is not None:
            inputs = treatment.inputs
            low, high = (
                (inputs.low, inputs.high)
                if self.scheme.grain == "channel"
                else tensor.ranges(inputs.low, 0, inputs)
            )
            found |= {"low": low.reshape(-1), "high": high.reshape(-1)}
        for name, buffer in list(self.named_buffers()):
            value = found[name]
            assert value is not None
            setattr(self, name, value.to(buffer.dtype).clone())

    def forward(self, step: Step, x: Tensor) -> Any:
        """One step of the treatment, as a call: hooks that fetch what was offloaded hang on it."""
        if step == "moved":
            return self._moved(x)
        if step == "ends":
            return self._ends(x)
        return self._rounded(x) if step == "rounded" else self._answered(x)

    def _moved(self, x: Tensor) -> Tensor:
        """(x - shift) / divisor, in fp32 where there is either."""
        if self.shift is not None:
            x = x.float() - self._spread(self.shift.float(), x)
        return x if self.divisor is None else x.float() / self._spread(self.divisor.float(), x)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the grid for moved `x`: stored, or of each token (of each picture, for a convolution)."""
        if self.low is not None and self.high is not None:
            return self._spread(self.low, x), self._spread(self.high, x)
        axes = (-1,) if self.linear else tuple(range(1, x.ndim))
        return x.amin(axes, keepdim=True).float(), x.amax(axes, keepdim=True).float()

    def _rounded(self, x: Tensor) -> Tensor:
        """Moved `x` on its grid, in floating point: what a machine computes that has no arithmetic for it. A kept weight takes it multiplied back."""
        if self.scheme.activation:
            x = rounded_between(x.float(), *self._ends(x), self.scheme.activation).to(x.dtype)
        return (
            x
            if self.divisor is None or self.scheme.format != "keep"
            else x * self._spread(self.divisor.float(), x)
        )

    def _answered(self, y: Tensor) -> Tensor:
        """The output with the first token's put in its place."""
        return (
            y
            if self.first is None
            else torch.cat([self.first.to(y.dtype).expand_as(y[:, :1]), y[:, 1:]], 1)
        )

    def extra_repr(self) -> str:
        """The scheme."""
        return str(self.scheme)

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        return values if self.linear else values.view(1, -1, *[1] * (x.ndim - 2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(same_type(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]  # torch has no types for it
