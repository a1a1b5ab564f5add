"""TaQ-DiT's shift of post-GELU inputs: subtract the middle of each channel's range, add W z to the
bias.

arXiv 2411.14172: z_c follows (max + min) / 2 over calibration batches with a momentum of 0.95; over
many batches in random order that is their mean, which is what is taken here. The subtraction stays
at run time, since it can't pass through the GELU before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...core.words import Buffer, Needs, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..transform import AbstractPackedStep, AbstractStep, Site

stage = Stage.SMOOTHING
number = None
scales_weight = False
unseen = "a bias for what the shift takes away"
needs = Needs.STATISTICS
needs_linear = True  # a convolution pads with zeros, which a shifted input no longer has
adds_bias = True


def stored(shape: Sequence[int], axis: int, number: int) -> dict[str, Buffer]:
    """A shift for each input channel; what it leaves to the bias is in the bias."""
    return {"shift": Buffer((shape[1 - axis],))}


def fit(site: Site) -> AbstractStep:
    """The shift of each input channel."""
    from ..affine import ChannelAffine

    return ChannelAffine.of(offset=site.inputs.middle, stored_as="shift")


def unpack(
    stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
) -> AbstractPackedStep:
    """Subtraction of the stored shift."""
    from ..affine import PackedAffine

    return PackedAffine.of(stored, "shift")
