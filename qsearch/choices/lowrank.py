"""A low-rank branch beside a quantized weight: W = L + Q, where L keeps what Q would lose most by.

y = Q x + up (down x). The branch takes the input as it is, not rounded, and its factors are fp16. L
is the best of its rank for the layer's inputs: with H = mean(x x^T) = C C^T, the truncated SVD of
(W - Q) C times C^-1; without moments that of W - Q. SVDQuant (arXiv 2411.05007, section 4.2)
alternates L = SVD(W - Q), Q = quantize(W - L) until the error rises, and so does `refined`.

Q, K and V read one tensor and may share `down`: their weights stacked along the rows are one
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import QSearchError
from .feedback import DAMPING
from .moments import output_error

MULTIPLE = 16  # ranks are multiples of what a tensor-core instruction takes
ROUNDS = 100  # SVDQuant's; the error rises long before


@dataclass(frozen=True)
class LowRank:
    """`down`: [rank, columns]; `up`: [rows, rank]; both fp32, values of fp16."""

    down: Tensor
    up: Tensor

    def values(self) -> Tensor:
        """fp32 [rows, columns]: their product."""
        return self.up @ self.down

    @property
    def stored_bits(self) -> int:
        """Bits in memory: 16 an entry."""
        return 16 * (self.down.numel() + self.up.numel())

    def split(self, rows: Sequence[int]) -> tuple[LowRank, ...]:
        """Branches of the weights that were stacked, with so many rows each and one `down`."""
        return tuple(LowRank(self.down, up) for up in self.up.split(list(rows)))


def check_rank(rank: int, weight: Tensor, layer: str) -> None:
    """Raises `QSearchError` for a rank that is no multiple of 16 or above the weight's own."""
    most = min(weight.shape)
    if rank <= 0 or rank % MULTIPLE or rank > most:
        size = " x ".join(map(str, weight.shape))
        best = min(most, max(rank, MULTIPLE)) // MULTIPLE * MULTIPLE
        remedy = f"the nearest is {best}" if best else "it is too small for one: leave it out"
        raise QSearchError(
            f"a low-rank branch has a rank of 16, 32, 48, ... up to the layer's; {layer} "
            f"is {size}, "
            f"given {rank}; {remedy}"
        )


class Factored:
    """`moments` [columns, columns] brought into C and C^-1 once, for any number of branches."""

    def __init__(self, moments: Tensor | None, layer: str = "the layer") -> None:
        self.moments = moments
        self.root: Tensor | None = None
        if moments is None:
            return
        if not bool(torch.isfinite(moments).all()):
            raise QSearchError(f"second moments must be finite; those of {layer} are not")
        square = moments.double()
        mean = float(square.diagonal().mean())
        damp = DAMPING * mean if mean > 0 else 1.0
        eye = torch.eye(len(square), dtype=torch.float64, device=square.device)
        self.root = torch.linalg.cholesky(square + damp * eye)

    def branch(self, weight: Tensor, rank: int) -> LowRank:
        """The branch of `rank` that leaves the least of a weight [rows, columns], in fp16."""
        wide = weight.double()
        left, size, right = torch.linalg.svd(
            wide if self.root is None else wide @ self.root, full_matrices=False
        )
        up, down = left[:, :rank] * size[:rank].sqrt(), size[:rank, None].sqrt() * right[:rank]
        if self.root is not None:
            down = torch.linalg.solve_triangular(self.root, down, upper=False, left=False)
            length = down.norm(dim=1).clamp(min=1e-30)  # both factors of one size, for fp16
            other = up.norm(dim=0).clamp(min=1e-30)
            even = (other / length).sqrt()
            up, down = up / even, down * even[:, None]
        return LowRank(down.half().float(), up.half().float())

    def error(self, off: Tensor) -> float:
        """Sum over rows of the mean squared output error of a weight error [rows, columns]."""
        if self.moments is None:
            return float(off.square().sum())
        return float(output_error(off, self.moments).sum())


def branch(
    weight: Tensor, rank: int, moments: Tensor | None = None, layer: str = "the weight"
) -> LowRank:
    """The low-rank part of a weight [rows, columns] that leaves the least (output) error.

    Args:
        weight: [rows, columns], smoothed or rotated if its inputs are.
        rank: a multiple of 16.
        moments: [columns, columns], the mean of x x^T; None = all inputs count alike.
        layer: its name in errors.

    Raises:
        QSearchError: for a rank that is no multiple of 16 or above the weight's, and for moments
            that are not finite.
    """
    check_rank(rank, weight, layer)
    return Factored(moments, layer).branch(weight, rank)


def refined(
    weight: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    moments: Tensor | None = None,
    layer: str = "the weight",
    rounds: int = ROUNDS,
) -> tuple[LowRank, Tensor]:
    """(branch, what `quantize` made of the rest): L and Q in turn until their error rises.

    Args:
        weight: fp32 [rows, columns].
        rank: a multiple of 16.
        quantize: fp32 [rows, columns] -> the values of its codes.
        moments: [columns, columns], the mean of x x^T; None = all inputs count alike.
        layer: its name in errors.
        rounds: at most so many.

    Raises:
        QSearchError: as `branch`.
    """
    check_rank(rank, weight, layer)
    factored = Factored(moments, layer)
    rest, best, least = torch.zeros_like(weight), None, float("inf")
    for _ in range(rounds):
        low = factored.branch(weight - rest, rank)
        rest = quantize(weight - low.values())
        error = factored.error(weight - low.values() - rest)
        if not error < least:
            break
        best, least = (low, rest), error
    if best is None:
        raise QSearchError(
            f"what is quantized beside a low-rank branch must be finite; {layer} is not"
        )
    return best
