"""Fake quantization of a layer's input: rounded as a scheme says and given back in floating point,
with gradients on demand.

What shares a scale is said by a plug-in in `activations/`; the grid by the format: integers lie
between the ends of a range (zero among them), floats symmetric about zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core import plugins
from ..core.scheme import Scheme
from ..core.words import GrainWord, split_word
from .codes import qparams_from_range, quantize_to_grid
from .format import grid_of, input_grid_of
from .statistics import LayerInputs


class AbstractActivation(GrainWord, Protocol):
    """What a module in `activations/` provides. Its contract is
    `qsearch.testing.ActivationContract`.

    Constants, two of which the grammar reads (`core.words.GrainWord`):
        word: what follows the format in a scheme, as the t of `+a8t`.
        needs_inputs: whether ranges come from calibration (static); else they are those of the
            input itself (dynamic).
        per_channel: whether channels have ranges of their own, so that no integer product can add
            them up.
        number: of a word with a number (`+a4g64`), a `core.words.Number`; such a module has
            `sized(number)`, which gives what is described here for that number.
    """

    per_channel: bool

    def ends(self, channels: int, parts: bool) -> int:
        """How many ranges a packed layer stores for `channels` input channels, `parts`: of a
        concatenation; 0 if none.
        """
        ...

    def ranges(self, x: Tensor, channel: int, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the grid for `x`, in shapes that spread over it; its channels lie
        on axis `channel`.
        """
        ...


def grain_plugin(scheme: Scheme) -> AbstractActivation:
    """The plug-in that says what shares a scale of the scheme's input."""
    name, number = split_word(scheme.grain)
    plugin = plugins.load("activations", name)
    found: AbstractActivation = plugin if number is None else plugin.sized(number)
    return found


def fake_quantize(x: Tensor, scheme: Scheme, inputs: LayerInputs | None, channel: int) -> Tensor:
    """fp32 `x`, whose channels lie on axis `channel`, rounded as the scheme rounds inputs;
    `inputs`: for static ranges.
    """
    if not scheme.activation:
        return x
    low, high = grain_plugin(scheme).ranges(x, channel, inputs)
    return fake_quantize_between(x, low, high, scheme.activation)


def fake_quantize_between(x: Tensor, low: Tensor, high: Tensor, form: str) -> Tensor:
    """fp32 `x` on the grid of `form` (what stands behind +a) from `low` to `high`, which spread
    over it.
    """
    return rounding_of(form).between(x, low, high)


@dataclass(frozen=True)
class Rounding:
    """The grid of an input's format, found once: a compiler can't follow questions to a plug-in.

    Attributes:
        word: the format.
        qparams: its `qparams_from_range`.
        rounded: its `round_to_grid`.
        stores_zero: whether zero may lie at any code, as integer products take inputs.
    """

    word: str
    qparams: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    rounded: Callable[[Tensor, Tensor, Tensor, str], Tensor]
    stores_zero: bool

    def between(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """fp32 `x` on the grid from `low` to `high`, which spread over it."""
        scale, zero = self.qparams(low, high, self.word)
        return self.rounded(x, scale, zero, self.word)


def rounding_of(form: str) -> Rounding:
    """The grid of `form`, what stands behind +a."""
    scheme = Scheme("keep", activation=form).activation_format
    grid = input_grid_of(scheme)
    return Rounding(scheme.format, grid.qparams_from_range, grid.round_to_grid, grid.stores_zero)


def lsq_fake_quantize(
    x: Tensor, low: Tensor, high: Tensor, form: str, range_scale: Tensor | None = None
) -> Tensor:
    """`fake_quantize_between` with gradients, both ends times `range_scale`: rounding counts as
    doing nothing, clipping as it is.

    The gradient of `range_scale` is LSQ's (arXiv 1902.08153): rounding error over the scale inside
    the range, its end outside.
    """
    scheme = Scheme("keep", activation=form).activation_format
    scale, zero = qparams_from_range(low, high, scheme)
    if range_scale is not None:
        scale = scale * range_scale
    inside = (x / scale).clamp(*grid_of(scheme).level_ends(scheme.format, zero))
    on_grid = quantize_to_grid(x.detach(), scale.detach(), zero, scheme).values() / scale.detach()
    return scale * (inside + (on_grid - inside).detach())


def straight_through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(x)`, whose gradient is that of `x` (Bengio et al., arXiv 1308.3432): rounding itself
    has none.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded(x)
    with torch.no_grad():
        moved = rounded(x) - x
    return x + moved


def site_rounding(scheme: Scheme) -> Callable[[Tensor], Tensor]:
    """What a scheme does to a tensor of an attention: each row, of a head or of the softmax, is
    rounded between its own ends.
    """

    def through(x: Tensor) -> Tensor:
        return fake_quantize(x.float(), scheme, None, -1).to(x.dtype)

    return through
