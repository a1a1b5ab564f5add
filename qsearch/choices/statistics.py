"""LayerInputs: calibration statistics of a layer's inputs: ranges, means, second moments, and a few
rows.

What is recorded here is all that methods, static ranges and transforms may go by;
`measure.calibration` records it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerInputs:
    """What went into one layer; all tensors fp32.

    Attributes:
        low: the smallest entry of each input channel [channels].
        high: the largest.
        middle: the mean over calls of the middle of each channel's range [channels].
        mean: [columns]; a convolution's columns are channels times taps.
        rows: some of the rows x that the weight is multiplied with [n, columns].
        moments: mean of x x^T over all of them [columns, columns].
        first: the first token [channels], where it is one and the same in all samples although the
            others are not (a text encoder that is causal).
        rest: the same record without the first token, for layers that see text alone.
        splits: channels of each part where the input is a concatenation (a long skip), whose parts
            differ in range.
    """

    low: Tensor
    high: Tensor
    middle: Tensor
    mean: Tensor
    rows: Tensor
    moments: Tensor | None = None
    first: Tensor | None = None
    rest: LayerInputs | None = None
    splits: tuple[int, ...] = ()

    def moved(self, offset: Tensor, scale: Tensor) -> LayerInputs:
        """The record of (x - offset) / scale, with [channels] each."""
        taps = len(self.mean) // len(self.low)
        away, size = offset.repeat_interleave(taps), scale.repeat_interleave(taps)
        moments = self.moments
        if moments is not None:
            cross = torch.outer(self.mean, away)
            moments = (moments - cross - cross.T + torch.outer(away, away)) / torch.outer(
                size, size
            )
        low, high, middle = ((t - offset) / scale for t in (self.low, self.high, self.middle))
        return replace(
            self,
            low=low,
            high=high,
            middle=middle,
            mean=(self.mean - away) / size,
            rows=(self.rows - away) / size,
            moments=moments,
        )
