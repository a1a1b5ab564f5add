"""SmoothQuant's channel balancing: divide each input channel by s, multiply the weight's column by
it.

s_c = max|x_c|^alpha / max|w_c|^(1 - alpha) (Xiao et al., arXiv 2211.10438, eq. 4); ViDiT-Q uses
alpha from 0.1 to 0.3 on diffusion transformers. `~balance30` has alpha = 0.30, `~balance` 0.50.
ViDiT-Q's one s for each range of steps is a plan with several ranges, which keeps a copy of the
weights for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...core.words import Buffer, Needs, Number, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..transform import AbstractPackedStep, AbstractStep, Site

stage = Stage.SMOOTHING
number = Number("its alpha in hundredths", low=0, high=100, default=50)
scales_weight = True
unseen = ""
needs = Needs.STATISTICS
needs_linear = False
adds_bias = False
_SMALLEST = 1e-5  # SmoothQuant's: a channel that is never used must not be blown up


def stored(shape: Sequence[int], axis: int, number: int) -> dict[str, Buffer]:
    """A divisor for each input channel."""
    return {"divisor": Buffer((shape[1 - axis],), typical=1.0)}


def fit(site: Site) -> AbstractStep:
    """The scale of each input channel; the number is alpha in hundredths."""
    from ..affine import ChannelAffine

    alpha = site.number / 100
    size = site.inputs.high.abs().maximum(site.inputs.low.abs()).clamp(min=_SMALLEST)
    columns = site.weight.abs().amax((0, 2)).clamp(min=_SMALLEST)
    return ChannelAffine.of(scale=(size.pow(alpha) / columns.pow(1 - alpha)).clamp(min=_SMALLEST))


def unpack(
    stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
) -> AbstractPackedStep:
    """Division by the stored divisor."""
    from ..affine import PackedAffine

    return PackedAffine.of(stored)
