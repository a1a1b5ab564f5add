"""A low-rank branch beside a quantized weight: W = L + Q, where L meets the input before it is
rounded.

`~lowrank32` keeps a branch of rank 32 in fp16 (`choices/lowrank.py`): L is the best of its rank for
the layer's inputs where calibration recorded their second moments, refined in turn with Q until the
error rises (SVDQuant, arXiv 2411.05007, section 4.2). Behind a smoothing or a rotation it is that
of the smoothed or rotated weight. The branch stores 16 bits an entry and costs rank x (inputs +
outputs) multiply-accumulates a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import QSearchError
from ...core.words import Buffer, Needs, Number, Stage
from ..transform import AbstractPackedStep, AbstractStep, Product, Site

if TYPE_CHECKING:
    from torch import Tensor

stage = Stage.LOW_RANK
number = Number("its rank", low=16, high=512, multiple=16)
scales_weight = True
unseen = ""
needs = Needs.NOTHING
needs_linear = True
adds_bias = False


def stored(shape: Sequence[int], axis: int, number: int) -> dict[str, Buffer]:
    """Both factors in fp16. Raises `QSearchError` for a rank above the layer's."""
    most = min(shape[axis], shape[1 - axis])
    if number > most:
        raise QSearchError(
            f"a branch's rank is at most that of its layer; given ~lowrank{number} for a weight of "
            f"{' x '.join(map(str, shape))}, whose rank is at most {most}"
        )
    return {"down": Buffer((number, shape[1 - axis])), "up": Buffer((shape[axis], number))}


@dataclass(frozen=True)
class Branch(AbstractStep):
    """L = up @ down, fp32 values of fp16: `down` [rank, columns], `up` [rows, rank]."""

    down: Tensor
    up: Tensor

    adds_output: ClassVar[bool] = True
    reads_input: ClassVar[bool] = True

    def weight(self, weight: Tensor) -> Tensor:
        """W - L."""
        return weight - (self.up @ self.down).to(weight.dtype)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """Q + L."""
        return weight + (self.up @ self.down).to(weight.dtype)

    def output(self, y: Tensor, product: Product) -> Tensor:
        """L x in place of L times the rounded input."""
        import torch.nn.functional as F

        assert product.x is not None and product.rounded is not None
        left = (product.x - product.rounded).to(self.down.dtype)
        return y + F.linear(F.linear(left, self.down), self.up).to(y.dtype)

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        """Both factors."""
        return {"down": self.down, "up": self.up}, product.bias


@dataclass(frozen=True)
class PackedBranch(AbstractPackedStep):
    """The branch at run time."""

    down: Tensor
    up: Tensor

    def restore_weight(self, weight: Tensor) -> Tensor:
        """Q + L."""
        return weight + (self.up.float() @ self.down.float()).to(weight.dtype)

    def stored_weight(self, weight: Tensor) -> Tensor:
        """W - L."""
        return weight - (self.up.float() @ self.down.float()).to(weight.dtype)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Q x + L x."""
        import torch.nn.functional as F

        down, up = (factor.to(y.dtype) for factor in (self.down, self.up))
        return y + F.linear(F.linear(x.to(y.dtype), down), up)


def fit(site: Site) -> AbstractStep:
    """The branch of a layer. Raises `QSearchError` for a rank above the weight's own."""
    from ..lowrank import refined
    from ..quantization import quantize

    weight = site.weight[:, :, 0]
    scheme = site.scheme.weight_only
    plain = type(scheme)(scheme.format, scheme.group)  # the branch leaves its method's work to it

    def codes(rest: Tensor) -> Tensor:
        return rest if plain.format == "keep" else quantize(rest, plain).dequantize()

    moments = None if site.statistics is None else site.statistics.moments
    low, _ = refined(weight, site.number, codes, moments, rounds=8)
    return Branch(low.down, low.up)


def unpack(
    stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
) -> AbstractPackedStep:
    """The branch of the stored factors."""
    return PackedBranch(stored["down"], stored["up"])
