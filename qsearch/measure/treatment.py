"""Treatment: what a scheme does to a layer's input, in the layer's own coordinates.

With a shift z and a scale s for each input channel the layer computes W x = (W s) ((x - z) / s) + W z; W s and (x - z) / s are rounded.
Seen from outside, the weight is Q(W s) / s and the input s Q((x - z) / s) + z, which is how they are simulated: every weight and
every input stays comparable with its full-precision self. What is left of the shift, (W - Q(W s) / s) z, is a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import plugins
from ..core.errors import QSearchError
from ..core.scheme import Scheme
from .calibration import LayerInputs
from .codes import element, nearest, spanning
from .quantization import method_of


@dataclass(frozen=True)
class Transform:
    """What one transform found: a shift and a scale for each input channel [channels], or a first token [channels] to leave out."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    first: Tensor | None = None


class AbstractActivation(Protocol):
    """What a module in `activations/` provides. Its contract is `qsearch.testing.ActivationContract`."""

    #: whether ranges come from calibration
    needs_inputs: bool

    def ranges(self, x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the grid for `x`, in shapes that spread over it; its channels lie on axis `channel`."""
        ...


class AbstractTransform(Protocol):
    """What a module in `transforms/` provides. Its contract is `qsearch.testing.TransformContract`."""

    #: whether it is for linear layers only
    needs_linear: bool

    def fit(self, weight: Tensor, inputs: LayerInputs, scheme: Scheme, amount: float) -> Transform:
        """What to do for a weight [rows, channels, taps] whose inputs were `inputs`; `amount` is the number in the transform's name, over 100."""
        ...


@dataclass(frozen=True)
class Treatment:
    """A layer's input under `scheme`: moved by `shift` and `scale` [channels], rounded by what `inputs` (moved as well) say.

    `first`: a token that is neither rounded nor multiplied with a rounded weight. `channel`: axis of the input's channels.
    """

    scheme: Scheme
    shift: Tensor
    scale: Tensor
    inputs: LayerInputs | None
    first: Tensor | None
    channel: int

    def before(self, x: Tensor) -> Tensor:
        """The layer's input as it is after rounding, in its own coordinates and type."""
        if not self.scheme.activation:
            return x
        if self._unmoved:
            return rounded(x.float(), self.scheme, self.inputs, self.channel).to(x.dtype)
        shape = [1] * x.ndim
        shape[self.channel] = -1
        shift, scale = self.shift.view(shape), self.scale.view(shape)
        return (
            rounded((x.float() - shift) / scale, self.scheme, self.inputs, self.channel) * scale
            + shift
        ).to(x.dtype)

    @cached_property
    def _unmoved(self) -> bool:
        return not self.shift.any() and bool((self.scale == 1).all())

    def after(self, y: Tensor, module: nn.Module, full: Tensor, weight: Tensor) -> Tensor:
        """The layer's output with what the shift leaves to the bias, and with the first token's in full precision.

        `full`, `weight`: the layer's weight as it is, and as it is simulated.
        """
        if self.shift.any():
            y = y + F.linear(self.shift.to(full), full - weight)
        if self.first is not None:
            token = (
                F.linear(self.first.to(full), full, getattr(module, "bias", None)).half().to(y)
            )  # as it is stored
            y = torch.cat([token.expand_as(y[:, :1]), y[:, 1:]], 1)
        return y


def rounded(x: Tensor, scheme: Scheme, inputs: LayerInputs | None, channel: int) -> Tensor:
    """fp32 `x` rounded as the scheme rounds inputs: integers between the ends of its range (zero among them), floats symmetric about zero."""
    if not scheme.activation:
        return x
    activation: AbstractActivation = plugins.load("activations", scheme.grain)
    return rounded_between(x, *activation.ranges(x, channel, inputs), scheme.activation)


def rounded_between(x: Tensor, low: Tensor, high: Tensor, form: str) -> Tensor:
    """fp32 `x` on the grid of `form` (one of `scheme.ACTIVATIONS`) from `low` to `high`, which spread over it."""
    scheme = Scheme(f"uint{form}" if form.isdigit() else form)
    scale, zero = spanning(low, high, scheme)
    if scheme.family == "float":  # the same numbers as by `nearest`, without a table of them
        number = element(scheme)
        return scale * (number.round(x / scale * 2.0**number.highest) / 2.0**number.highest)
    return nearest(x, scale, zero, scheme).values()


def named(scheme: Scheme) -> tuple[tuple[str, AbstractTransform, float], ...]:
    """The transforms of a scheme: what it calls them, the plug-in, and its number over 100 (a half where it has none)."""
    found = []
    for name in scheme.transforms:
        word = name.rstrip("0123456789")
        transform: AbstractTransform = plugins.load("transforms", word)
        found.append((word, transform, int(name[len(word) :] or 50) / 100))
    return tuple(found)


def _static(scheme: Scheme) -> bool:
    return bool(scheme.activation) and bool(plugins.load("activations", scheme.grain).needs_inputs)


def needs_inputs(scheme: Scheme) -> bool:
    """Whether carrying out a scheme takes calibration: for its method, for static ranges, or for a transform."""
    return (
        bool(scheme.transforms)
        or _static(scheme)
        or (scheme.format != "keep" and method_of(scheme).needs_inputs)
    )


def treat(
    scheme: Scheme,
    weight: Tensor,
    module: nn.Module,
    inputs: LayerInputs | None,
    *,
    layer: str,
    transforms: Sequence[tuple[str, AbstractTransform, float]] = (),
) -> Treatment | None:
    """What `scheme` does to the input of `module` (named `layer` in errors) after `transforms`, or None where it does nothing.

    Raises `QSearchError` where calibration is wanted and missing, and for layers that a transform is not made for.
    """
    if not scheme.activation and not transforms:
        return None
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        raise QSearchError(
            f"inputs are rounded for linear layers and convolutions; {layer} is {type(module).__name__}, give it weights only"
        )
    linear = isinstance(module, nn.Linear)
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    plain = isinstance(module, nn.Linear) or not (module.transposed or module.groups > 1)
    for word, transform, _ in transforms:
        if not plain or (transform.needs_linear and not linear):
            suited = (
                "linear layers"
                if transform.needs_linear
                else "linear layers and convolutions in one group"
            )
            raise QSearchError(f"~{word} is for {suited}; {layer} is {type(module).__name__}")
    if inputs is None and (transforms or _static(scheme)):
        raise QSearchError(
            f"{scheme} needs to know the inputs of {layer}; give QuantizedWeights(model, graph, calibrate(model, graph, calls))"
        )
    shift, scale, first = (
        weight.new_zeros(channels).float(),
        weight.new_ones(channels).float(),
        None,
    )
    for word, transform, amount in transforms:
        assert inputs is not None
        moved = weight.float() * scale.view(1, -1, *[1] * (weight.ndim - 2))
        try:
            found = transform.fit(
                moved[:, :, None] if linear else moved.flatten(2), inputs, scheme, amount
            )
        except QSearchError as error:
            raise QSearchError(f"{layer} can't have {scheme}: {error}") from error
        if found.first is not None:
            if inputs.rest is None or len(shift.nonzero()) or not bool((scale == 1).all()):
                raise QSearchError(
                    f"~{word} leaves a token out of what the other transforms go by; it comes first, not as in {scheme}"
                )
            first, inputs = found.first, inputs.rest
            continue
        away = found.shift if found.shift is not None else torch.zeros_like(shift)
        size = (
            found.scale.half().float().clamp(min=2.0**-14)
            if found.scale is not None
            else torch.ones_like(scale)
        )
        assert size.shape == away.shape == shift.shape, (
            f"~{word} must give a number for each of {channels} channels, it gave {tuple(size.shape)}"
        )
        away = away.half().float()
        inputs = inputs.moved(away, size)
        shift, scale = shift + away * scale, scale * size
    return Treatment(scheme, shift, scale, inputs, first, -1 if linear else 1)
