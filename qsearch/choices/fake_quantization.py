"""Fake quantization of a layer's input: rounded as a scheme says and given back in floating point, with gradients on demand.

What shares a scale is said by a plug-in in `activations/`; the grid by the format: integers lie between the ends of a range
(zero among them), floats symmetric about zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..core import plugins
from ..core.scheme import Scheme
from ..core.words import GrainWord
from .codes import element, largest, qparams_from_range, quantize_to_grid
from .statistics import LayerInputs


class AbstractActivation(GrainWord, Protocol):
    """What a module in `activations/` provides. Its contract is `qsearch.testing.ActivationContract`.

    Constants, two of which the grammar reads (`core.words.GrainWord`):
        word: what follows the format in a scheme, as the t of `+a8t`.
        needs_inputs: whether ranges come from calibration (static); else they are those of the input itself (dynamic).
        per_channel: whether channels have ranges of their own, so that no integer product can add them up.
    """

    per_channel: bool

    def ends(self, channels: int, parts: bool) -> int:
        """How many ranges a packed layer stores for `channels` input channels, `parts`: of a concatenation; 0 if none."""
        ...

    def ranges(self, x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the grid for `x`, in shapes that spread over it; its channels lie on axis `channel`."""
        ...


def grain_plugin(scheme: Scheme) -> AbstractActivation:
    """The plug-in that says what shares a scale of the scheme's input."""
    plugin: AbstractActivation = plugins.load("activations", scheme.grain)
    return plugin


def fake_quantize(x: Tensor, scheme: Scheme, inputs: LayerInputs | None, channel: int) -> Tensor:
    """fp32 `x`, whose channels lie on axis `channel`, rounded as the scheme rounds inputs; `inputs`: for static ranges."""
    if not scheme.activation:
        return x
    low, high = grain_plugin(scheme).ranges(x, channel, inputs)
    return fake_quantize_between(x, low, high, scheme.activation)


def fake_quantize_between(x: Tensor, low: Tensor, high: Tensor, form: str) -> Tensor:
    """fp32 `x` on the grid of `form` (one of `scheme.ACTIVATIONS`) from `low` to `high`, which spread over it."""
    scheme = _weight_like(form)
    scale, zero = qparams_from_range(low, high, scheme)
    if (
        scheme.family == "float"
    ):  # the same numbers as by `quantize_to_grid`, without a table of them
        number = element(scheme)
        return scale * (number.round(x / scale * 2.0**number.highest) / 2.0**number.highest)
    return quantize_to_grid(x, scale, zero, scheme).values()


def lsq_fake_quantize(
    x: Tensor, low: Tensor, high: Tensor, form: str, range_scale: Tensor | None = None
) -> Tensor:
    """`fake_quantize_between` with gradients, both ends times `range_scale`: rounding counts as doing nothing, clipping as it is.

    The gradient of `range_scale` is LSQ's (arXiv 1902.08153): rounding error over the scale inside the range, its end outside.
    """
    scheme = _weight_like(form)
    scale, zero = qparams_from_range(low, high, scheme)
    if range_scale is not None:
        scale = scale * range_scale
    ends = (
        (-zero, 2**scheme.bits - 1 - zero)
        if scheme.family == "uint"
        else (-largest(scheme), largest(scheme))
    )
    inside = (x / scale).clamp(*(torch.as_tensor(end, device=x.device) for end in ends))
    on_grid = quantize_to_grid(x.detach(), scale.detach(), zero, scheme).values() / scale.detach()
    return scale * (inside + (on_grid - inside).detach())


def straight_through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(x)`, whose gradient is that of `x` (Bengio et al., arXiv 1308.3432): rounding itself has none."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded(x)
    with torch.no_grad():
        moved = rounded(x) - x
    return x + moved


def site_rounding(scheme: Scheme) -> Callable[[Tensor], Tensor]:
    """What a scheme does to a tensor of an attention: each row, of a head or of the softmax, is rounded between its own ends."""

    def through(x: Tensor) -> Tensor:
        return fake_quantize(x.float(), scheme, None, -1).to(x.dtype)

    return through


def _weight_like(form: str) -> Scheme:
    """The scheme of weights that has the grid of an input's format."""
    return Scheme(f"uint{form}" if form.isdigit() else form)
