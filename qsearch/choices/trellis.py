"""Trellis-coded weights: 2, 3 or 4 bits a weight, one scale a row, near the rate-distortion limit.

The bits of a tile of about 64 rows x 4 columns are one path through a trellis of 2^8 to 2^14 states
(QTIP, arXiv 2406.11235); layout, levels and Viterbi's algorithm are `qsearch_kernels.trellis`.
Tiles are narrow so that feedback by second moments reaches most columns: within a tile nothing is
made up for. On scenes-dit, rotated, at 2 bits, tiles of 16, 8 and 4 columns had 14.9, 16.3 and 17.0
dB of the denoiser's output.

A row's scale makes it a little narrower than the levels, whose spread is Gaussian; rows with
heavier tails get a wider one, where clipping would cost more than coarser steps. After encoding,
each scale is fitted once more to the codes by least squares (of the output, where moments are
given).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsearch_kernels import trellis
from qsearch_kernels.trellis_encode import encode
from qsearch_kernels.trellis_ops import decode_trellis

from ..core.errors import QSearchError
from .codes import round_to_fp16
from .feedback import with_feedback
from .formats.trellis import too_small

#: 2**STATES states where nothing else is asked for: 0.1 dB below 2**14, at a quarter of the time
STATES = 12
#: how much wider than a Gaussian row's a scale may be
_WIDER = (1.0, 1.12, 1.25, 1.4, 1.6, 1.9, 2.3)
#: levels beyond which a weight is clipped, and squared error of the codes of unclipped ones, in
#: levels^2, by bits: of Gaussian numbers at the scale that suits them
_TOP = 100.0
_ERROR = {2: 85.0, 3: 22.0, 4: 5.2}


@dataclass(frozen=True)
class TrellisCodes:
    """`packed`: uint8, of `trellis.packed_shape`. `scale`: fp32 [rows, 1], values of
    fp16.

    `bits` a weight, `states`: log2 of their number, `columns` of a row.
    """

    packed: Tensor
    scale: Tensor
    bits: int
    states: int
    columns: int

    def values(self) -> Tensor:
        """fp32 [rows, columns]: what the codes stand for."""
        size = (len(self.scale), self.columns)
        level: Tensor = decode_trellis(self.packed, self.bits, self.states, *size)
        return level.float().mul_(self.scale)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.packed.device

    @property
    def stored_bits(self) -> int:
        """Bits in memory: whole tiles, and 16 for each row's scale."""
        return 8 * self.packed.numel() + 16 * self.scale.numel()


def trellis_codes(
    weight: Tensor,
    bits: int,
    states: int = STATES,
    moments: Tensor | None = None,
    layer: str = "the weight",
) -> TrellisCodes:
    """Codes of a weight [rows, columns].

    Args:
        weight: any float type, the channels of the output first. bits: 2, 3 or 4 a weight. states:
        log2 of the number of states: 8, 10, 12 or 14. moments: [columns, columns], the mean of x
        x^T over the layer's inputs: errors are fed back to
            later tiles by them. None: each weight is coded for itself, which needs no data.
        layer: its name in errors.

    Raises:
        QSearchError: for a weight smaller than a tile, and for numbers that are not finite.
    """
    if bits not in trellis.BITS or states not in trellis.STATES:
        raise QSearchError(
            f"trellis codes have 2, 3 or 4 bits a weight and 2^8, 2^10, 2^12 or 2^14 states; "
            f"given {bits} bits and 2^{states} states for {layer}"
        )
    if weight.ndim != 2 or (fault := too_small(*weight.shape)):
        shape = " x ".join(map(str, weight.shape))
        raise QSearchError(f"{layer} is {shape}: {fault if weight.ndim == 2 else 'no matrix'}")
    rows = weight.detach().float()
    if not bool(torch.isfinite(rows).all()):
        raise QSearchError(
            f"weights must be finite to be quantized; {layer} holds "
            f"{int((~torch.isfinite(rows)).sum())} that are not"
        )
    scale = _scales(rows, bits)
    found: list[Tensor] = []

    def coded(columns: Tensor, begin: int) -> Tensor:
        packed = encode(trellis.to_tiles(columns / scale), bits, states)
        found.append(packed)
        level: Tensor = decode_trellis(packed, bits, states, *columns.shape)
        return level.float().mul_(scale)

    if moments is None:
        values = coded(rows, 0)
    else:
        values = with_feedback(rows, trellis.COLUMNS, moments, coded, layer)
    fitted = round_to_fp16((scale * _fitted(rows, values, moments)).abs())
    fitted = fitted * rows.any(1, keepdim=True)  # rows of zeros stay zeros
    return TrellisCodes(torch.cat(found, 1), fitted, bits, states, rows.shape[1])


def _scales(rows: Tensor, bits: int) -> Tensor:
    """fp32 [rows, 1]: of a few widths the one that costs a row least, by clipping and by steps."""
    spread = rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    least = spread * trellis.NARROWER[bits] / trellis.DEVIATION
    best, cost = least, torch.full_like(least, torch.inf)
    for wider in _WIDER:
        scale = least * wider
        clipped = (rows.abs() - _TOP * scale).clamp(min=0).square().mean(1, keepdim=True)
        total = clipped + _ERROR[bits] * scale.square()
        best = torch.where(total < cost, scale, best)
        cost = torch.minimum(cost, total)
    return best


def _fitted(rows: Tensor, values: Tensor, moments: Tensor | None) -> Tensor:
    """[rows, 1]: the factor of each row of values that leaves least (output) error; 1 for zeros."""
    seen = values if moments is None else values @ moments.to(values)
    up, down = (rows * seen).sum(1, keepdim=True), (values * seen).sum(1, keepdim=True)
    factor = up / down
    return torch.where((down > 0) & (factor > 0.5) & (factor < 2), factor, torch.ones_like(factor))
