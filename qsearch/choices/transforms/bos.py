"""MixDQ's text: the first token's output is computed beforehand in full precision and takes no part
in rounding.

A causal text encoder gives the same first token for every prompt, and an outlying one, so that a
layer of text keys or values has one constant output for it (MixDQ, arXiv 2405.17873, section 3.1).
Only where calibration saw that it is constant: encoders that look both ways (T5) change it with the
prompt, and are refused. Ranges are those of the other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import QSearchError
from ...core.words import Buffer, Needs, Stage
from ..transform import AbstractPackedStep, AbstractStep, Product

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics import LayerInputs
    from ..transform import Site

stage = Stage.FIRST_TOKEN
number = None
scales_weight = False
unseen = "a first token that meets the full weight"
needs = Needs.STATISTICS
needs_linear = True
adds_bias = False


def stored(shape: Sequence[int], axis: int, number: int) -> dict[str, Buffer]:
    """The first token's output."""
    return {"first": Buffer((shape[axis],))}


def fit(site: Site) -> AbstractStep:
    """The constant token. Raises `QSearchError` where calibration does not show one."""
    if site.inputs.rest is None:
        raise QSearchError(
            "~bos is for layers that see text alone, a row a token (the keys and values "
            "of cross-attention)"
        )
    if site.inputs.first is None:
        raise QSearchError(
            "~bos needs a causal text encoder, whose first token is the same for every "
            "prompt; calibration saw it change, or saw one prompt only"
        )
    return FirstToken(site.inputs.first)


def unpack(
    stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
) -> AbstractPackedStep:
    """The stored output in the first token's place."""
    return FirstOutput(stored["first"])


@dataclass(frozen=True)
class FirstToken(AbstractStep):
    """The token [channels] that every prompt begins with."""

    token: Tensor

    adds_output: ClassVar[bool] = True

    def statistics(self, inputs: LayerInputs) -> LayerInputs:
        """Those of the other tokens."""
        assert inputs.rest is not None
        return inputs.rest

    def effective(self, x: Tensor, rounded: Tensor) -> Tensor:
        """The first token's output does not depend on its rounding."""
        import torch

        return torch.cat([x[:, :1], rounded[:, 1:]], 1)

    def output(self, y: Tensor, product: Product) -> Tensor:
        """With the first token's output in full precision."""
        return FirstOutput(self._answer(product).half()).output(y, y)

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        """The first token's output."""
        return {"first": self._answer(product)}, product.bias

    def _answer(self, product: Product) -> Tensor:
        import torch.nn.functional as F

        return F.linear(self.token.to(product.full), product.full, product.bias)


@dataclass(frozen=True)
class FirstOutput(AbstractPackedStep):
    """The output [outputs] of the first token, computed beforehand."""

    first: Tensor

    def stored_weight(self, weight: Tensor) -> Tensor:
        """Refused: the first token's output was computed with the weight of before."""
        raise QSearchError(
            "a layer with ~bos holds its first token's output, which another weight would change"
        )

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """The stored output in the first token's place."""
        import torch

        return torch.cat([self.first.to(y.dtype).expand_as(y[:, :1]), y[:, 1:]], 1)
