"""Transforms of a layer's input: what a plug-in provides, what fitting one gives, and what of it a
packed layer stores.

A layer computes W x. A transform rewrites the product before its two factors are rounded: x becomes
`input(x)`, W becomes `weight(W)`, and whatever the two no longer say is added to the output.
Transforms are applied one after the other, each to what the one before left, in the order of their
stages (first token, smoothing, rotation, low-rank branch). Seen from outside, in the layer's own
coordinates, the layer multiplies `restore_weight(Q(weight(W)))` with `restore(Q(input(x)))`: that
is how it is simulated, so that every weight and every input stays comparable with its
full-precision self.

A fitted transform is an `AbstractStep`; what a packed layer makes of the tensors that it stored is
an `AbstractPackedStep`. Both are written in plain tensors, without modules, and their methods do
nothing unless a step says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from ..core.errors import QSearchError
from ..core.words import TransformWord

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.scheme import Scheme
    from .statistics import LayerInputs


@dataclass(frozen=True)
class Site:
    """What a transform is fitted to.

    Attributes:
        weight: fp32 [rows, channels, taps], as the transforms before this one leave it; one tap in
            a linear layer.
        bias: the layer's bias [rows], or None.
        scheme: the whole scheme of the layer.
        number: the number in the transform's word, its default where it has none.
        statistics: what calibration knows of the layer's inputs, as the transforms before this one
            leave them; None where the transform needs nothing and there was no calibration.
    """

    weight: Tensor
    bias: Tensor | None
    scheme: Scheme
    number: int
    statistics: LayerInputs | None

    @property
    def inputs(self) -> LayerInputs:
        """`statistics` of a transform that needs them, and was therefore given them."""
        assert self.statistics is not None
        return self.statistics


@dataclass(frozen=True)
class Product:
    """One product of a layer, in the coordinates in which a step's input lies.

    Attributes:
        full: the weight in full precision.
        weight: the weight as it is simulated.
        bias: the layer's bias, or None.
        x: the input before it is rounded; None where no step of the layer says `reads_input`.
        rounded: the input as it is multiplied; None likewise.
    """

    full: Tensor
    weight: Tensor
    bias: Tensor | None
    x: Tensor | None = None
    rounded: Tensor | None = None


class AbstractStep:
    """A fitted transform. Every method here does nothing: a step overrides what it does.

    `axis` is that of the input's channels, -1 or 1. A weight has its output channels first and its
    input channels second.
    """

    #: whether `output` adds something
    adds_output: ClassVar[bool] = False
    #: whether `output` looks at the input
    reads_input: ClassVar[bool] = False

    def statistics(self, inputs: LayerInputs) -> LayerInputs:
        """Statistics of `input(x)` by those of x.

        Args:
            inputs: statistics of the layer's input, channel by channel.

        Returns:
            Statistics of what `input` makes of it; `inputs` itself where nothing is done to it.
        """
        return inputs

    def input(self, x: Tensor, axis: int) -> Tensor:
        """What is rounded in place of x.

        Args:
            x: the layer's input, channels on `axis`.
            axis: of the channels, -1 or 1.

        Returns:
            A tensor of the same shape.
        """
        return x

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """Inverse of `input`.

        Args:
            x: a tensor in the coordinates of `input`'s result.
            axis: of the channels, -1 or 1.

        Returns:
            The tensor in the coordinates of the layer's input, of the same shape.
        """
        return x

    def weight(self, weight: Tensor) -> Tensor:
        """What is stored in place of the weight.

        Args:
            weight: [outputs, inputs, ...], in full precision.

        Returns:
            The weight that is quantized, of the same shape.
        """
        return weight

    def restore_weight(self, weight: Tensor) -> Tensor:
        """Inverse of `weight`.

        Args:
            weight: [outputs, inputs, ...], as `weight` leaves it.

        Returns:
            The weight in the coordinates of the layer's input, of the same shape.
        """
        return weight

    def output(self, y: Tensor, product: Product) -> Tensor:
        """The layer's output, where `y` is what the simulated weight and the rounded input give
        (with the bias).

        Args:
            y: the layer's output, channels where the layer has them.
            product: weight and input that made it.

        Returns:
            A tensor of the same shape.
        """
        return y

    def effective(self, x: Tensor, rounded: Tensor) -> Tensor:
        """Of a rounded input, what reaches the product: `x` itself where the output does not depend
        on its rounding.

        Args:
            x: the input before it is rounded.
            rounded: the same, rounded.

        Returns:
            What the first-order price of the rounding counts, of the same shape.
        """
        return rounded

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a packed layer stores, by the names that the plug-in's `stored` lists, and the
        layer's new bias.

        Args:
            product: weight in full precision, simulated weight and bias.

        Returns:
            (name -> tensor, the bias or None).
        """
        return {}, product.bias


class AbstractPackedStep:
    """A transform at run time, made of what was stored. Every method here does nothing: a step
    overrides what it does.
    """

    def input(self, x: Tensor, axis: int) -> Tensor:
        """What is rounded in place of x.

        Args:
            x: the layer's input.
            axis: of the channels, -1 or 1.

        Returns:
            A tensor of the same shape.
        """
        return x

    def restore(self, x: Tensor, axis: int) -> Tensor:
        """Inverse of `input` for a weight that is kept as it is, but for what went into the bias.

        Args:
            x: a tensor in the coordinates of `input`'s result.
            axis: of the channels, -1 or 1.

        Returns:
            The tensor in the coordinates of the layer's input, of the same shape.
        """
        return x

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The weight in the coordinates of x.

        Args:
            weight: [outputs, inputs, ...], dequantized.

        Returns:
            A weight of the same shape.
        """
        return weight

    def stored_weight(self, weight: Tensor) -> Tensor:
        """Inverse of `restore_weight`, for a weight that takes the place of the stored one (an
        adapter that is fused).

        Args:
            weight: [outputs, inputs, ...], in the coordinates of the layer's input.

        Returns:
            The weight to be quantized, of the same shape.

        Raises:
            QSearchError: more than the weight would change, or the plug-in says how a weight is
                read and not how another is stored.
        """
        if type(self).restore_weight is not AbstractPackedStep.restore_weight:
            raise QSearchError(
                f"{type(self).__name__} has no `stored_weight`, the inverse of its "
                "`restore_weight`: a packed layer with it takes no other weight"
            )
        return weight

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output, where `y` is what the packed product of `x` gives (with the bias).

        Args:
            y: the product, with the bias.
            x: the layer's input, as it came.

        Returns:
            A tensor of the shape of `y`.
        """
        return y


class AbstractTransform(TransformWord, Protocol):
    """What a module in `choices/transforms/` provides. Its contract is
    `qsearch.testing.TransformContract`.

    Constants, which the grammar reads (`core.words.TransformWord`):
        stage: where it stands among a scheme's transforms.
        number: the number that its word takes, or None.
        scales_weight: whether it changes what is stored of the weight.
        unseen: what it does besides moving weight and input, in words, which a gradient of the two
            can't see; "" if nothing.
        needs: what it needs to know of the layer's inputs.
        needs_linear: whether it is for linear layers only.
        adds_bias: whether a packed layer needs a bias for it.
    """

    def fit(self, site: Site) -> AbstractStep:
        """The transform for one layer.

        Args:
            site: the layer with its weight and what calibration recorded of its input.

        Returns:
            The transform with everything that was chosen for this layer.

        Raises:
            QSearchError: the layer is none that the transform is for.
        """
        ...

    def unpack(
        self, stored: Mapping[str, Tensor], shape: Sequence[int], axis: int, number: int
    ) -> AbstractPackedStep:
        """The transform at run time, from the tensors that `stored` lists for a weight of `shape`,
        outputs on `axis`.

        Args:
            stored: name -> tensor, as `AbstractStep.pack` gave them.
            shape: of the weight.
            axis: of the weight's output channels.
            number: the number of the transform's word, as the 30 of `~balance30`.

        Returns:
            The transform, for a packed layer.
        """
        ...
