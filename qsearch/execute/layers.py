"""QuantLinear, QuantConv2d and QuantConvolution: layers that hold a packed weight and compute with
it.

With an offset z and a divisor s of each input channel, the layer computes W x + b = (W s) ((x - z)
/ s) + (W z + b): codes of W s are stored, the bracket at the end is the bias, and what a plan
rounds is the middle. `dequantize` gives the weight in the layer's own coordinates, as `simulate`
shows it. Where inputs are integers and the machine multiplies bytes, it does
(`qsearch_kernels.cpu`, `qsearch_kernels.gpu_ops`); else inputs are rounded in floating point and
multiplied with the widened weight, which gives the same numbers and saves memory alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch_kernels import products

from ..choices.packed_weight import AbstractPackedWeight, ConvolutionShape, empty_weight
from ..choices.quantization import quantize_parts
from ..core.errors import QSearchError
from ..core.scheme import Scheme
from ..core.scheme import parts as split
from ..core.words import transform_word
from .inputs import Given, Input
from .packing import AnyWeight, KeptWeight
from .written import PackedView

_CONVOLVE: dict[tuple[int, bool], Any] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
Convolution = nn.modules.conv._ConvNd


def _weights(
    scheme: Scheme, weight: Tensor, axis: int, splits: Sequence[int], device: torch.device | str
) -> nn.ModuleList:
    """Empty packed weights, one a part; the weight itself where it is kept."""
    if scheme.format == "keep":
        return nn.ModuleList(
            [
                KeptWeight(
                    weight
                    if isinstance(weight, nn.Parameter)
                    else nn.Parameter(weight, requires_grad=False),
                    axis,
                )
            ]
        )
    shapes = split(weight.shape, axis, splits)
    return nn.ModuleList(
        empty_weight(scheme, s[axis], math.prod(s) // s[axis], device) for s in shapes
    )


def _whole(
    parts: Sequence[AnyWeight],
    shape: Sequence[int],
    axis: int,
    splits: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight [shape] of rows that `parts` hold, in the coordinates in which it is stored."""
    pieces = []
    for part, piece in zip(
        parts, split(shape, axis, splits if len(parts) > 1 else ()), strict=True
    ):
        moved = [piece[axis], *(n for i, n in enumerate(piece) if i != axis)]
        pieces.append(part.dequantize(dtype).view(moved).movedim(0, axis))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1 - axis)


class _Layer(nn.Module):
    """What the layers share: a scheme, weights by parts, a bias, an input's rounding."""

    bias: nn.Parameter | None

    def __init__(
        self,
        scheme: Scheme,
        source: nn.Linear | Convolution,
        axis: int,
        splits: Sequence[int],
        device: torch.device | str,
    ) -> None:
        nn.Module.__init__(self)  # and not that of `nn.Linear`, which would make a weight
        linear = isinstance(source, nn.Linear)
        weight = source.weight
        self.scheme, self.shape, self.axis, self.splits = (
            scheme,
            tuple(weight.shape),
            axis,
            tuple(splits),
        )
        self.parts = _weights(scheme, weight, axis, splits, device)
        bias = cast(nn.Parameter | None, source.bias)
        if bias is None and any(transform_word(word).adds_bias for word in scheme.transforms):
            bias = nn.Parameter(
                weight.new_zeros(weight.shape[axis], device=device), requires_grad=False
            )
        self.register_parameter("bias", bias)
        rounds = bool(scheme.activation or scheme.transforms)
        self.input = (
            Input(scheme, weight.shape, axis, linear=linear, parts=bool(splits), device=device)
            if rounds
            else None
        )
        #: kinds of device that multiply the rounded input as it is; elsewhere the weight is widened
        self.devices = frozenset[str]()
        if self.input is not None and self.input.bits:
            self.devices = frozenset.intersection(*(part.devices for part in self.weights))

    @property
    def weights(self) -> list[AnyWeight]:
        """The parts, one for each part of the input."""
        return [cast(AnyWeight, part) for part in self.parts]

    def ends_of(self, end: Tensor | None, axis: int) -> list[Tensor | None]:
        """One end of the grid for each part: the part's own, or the one that all have."""
        if end is None or self.input is None or not self.input.apart or len(self.parts) == 1:
            return [end] * len(self.parts)
        return [piece.narrow(axis, 0, 1) for piece in end.split(list(self.splits), axis)]

    def cut(self, x: Tensor, axis: int) -> Sequence[Tensor]:
        """The input as one piece a part."""
        return x.split(list(self.splits), axis) if len(self.parts) > 1 else (x,)

    @property
    def weight(self) -> Tensor:
        """`dequantize()`, in the type of the bias: for code that looks at a layer's weight, or
        replaces its `data` (adapters that are fused).
        """
        made = self.dequantize(self.bias.dtype if self.bias is not None else torch.float32)
        return made if torch.compiler.is_compiling() else PackedView.of(made, self.write)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Store another weight [shape] in place of the layer's, rounded as its format rounds
        without data.

        Raises:
            QSearchError: another shape, values that are not finite, a transform that holds more of
                the weight than its codes.
        """
        if tuple(weight.shape) != self.shape:
            raise QSearchError(
                f"a layer of {' x '.join(map(str, self.shape))} takes no weight of "
                f"{' x '.join(map(str, weight.shape))}"
            )
        first = self.weights[0]
        if isinstance(first, KeptWeight):
            first.values.data.copy_(weight)
            return
        weight = weight.to(next(self.parts.buffers()).device, torch.float32)
        stored = weight if self.input is None else self.input.stored_weight(weight)
        plain = Scheme(self.scheme.format, self.scheme.group)
        splits = self.splits if len(self.parts) > 1 else ()
        made = quantize_parts(stored, plain, axis=self.axis, splits=splits)
        for part, quantized in zip(self.weights, made, strict=True):
            assert isinstance(part, AbstractPackedWeight)
            part.fill(quantized)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [shape] that the layer stands for, in its own coordinates."""
        whole = _whole(self.weights, self.shape, self.axis, self.splits, torch.float32)
        if self.input is not None and self.scheme.format != "keep":
            whole = self.input.restore_weight(whole)
        return whole.to(dtype)

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{' x '.join(map(str, self.shape))}, {self.scheme}"


class QuantLinear(_Layer, nn.Linear):  # type: ignore[misc, override]  # a weight made on demand
    """`nn.Linear` with a packed weight; one by its class too, so that adapters take it (peft)."""

    def __init__(
        self,
        scheme: Scheme,
        source: nn.Linear,
        splits: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(scheme, source, 0, splits, device)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the type of `x`."""
        if self.input is None:
            return self._sum(x, None, None)
        given: Given = self.input(x, rounds=x.device.type not in self.devices)
        y = self._sum(given.x, given.low, given.high)
        return given.output(y.to(x.dtype))

    def _sum(self, x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        y: Tensor | None = None
        for part, piece, bottom, top in zip(
            self.weights,
            self.cut(x, -1),
            self.ends_of(low, -1),
            self.ends_of(high, -1),
            strict=True,
        ):
            made = self._product(part, piece, self.bias if y is None else None, bottom, top)
            y = made if y is None else y + made
        assert y is not None
        return y

    def _product(
        self,
        part: AnyWeight,
        x: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
    ) -> Tensor:
        if isinstance(part, KeptWeight):
            values = part()
            return products.dense_linear(x.to(values.dtype), values, bias)
        if self.input is not None and x.device.type in self.devices:
            return part.linear_rounded(x, bias, self.input.bits, low, high)
        return part.linear(x, bias)


class QuantConv2d(_Layer, nn.Conv2d):  # type: ignore[misc, override]  # likewise
    """`nn.Conv2d` with a packed weight; one by its class too, so that adapters take it (peft)."""

    def __init__(
        self,
        scheme: Scheme,
        source: nn.Conv2d,
        splits: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(scheme, source, 0, splits, device)
        self.in_channels, self.out_channels, self.groups = (
            source.in_channels,
            source.out_channels,
            source.groups,
        )
        self.kernel_size, self.stride, self.padding, self.dilation = (
            source.kernel_size,
            source.stride,
            source.padding,
            source.dilation,
        )
        self.padding_mode, self.edges = (
            source.padding_mode,
            list(source._reversed_padding_repeated_twice),
        )
        plain = (
            self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        )  # else it is no product of rows
        even = all(len(set(places)) == 1 for places in (self.stride, self.padding, self.dilation))
        found = (
            frozenset.intersection(self.devices, *(part.convolving for part in self.weights))
            if plain
            else frozenset()
        )
        self.devices = (
            found if even else found - {"cuda"}
        )  # its kernel has one of each for both axes

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, h, w], in the type of `x`."""
        rounds = x.device.type not in self.devices
        given = Given(x) if self.input is None else self.input(x, rounds=rounds)
        if self.input is not None and not rounds:
            y: Tensor | None = None
            for part, piece, bottom, top in zip(
                self.weights,
                self.cut(given.x, 1),
                self.ends_of(given.low, 1),
                self.ends_of(given.high, 1),
                strict=True,
            ):
                assert isinstance(part, AbstractPackedWeight)
                made = self._product(
                    part, piece, self.bias if y is None else None, self.input.bits, bottom, top
                )
                y = made if y is None else y + made
            assert y is not None
            return given.output(y.to(x.dtype))
        inside = products.fast_float(given.x)
        whole = _whole(self.weights, self.shape, 0, self.splits, inside.dtype)
        bias = None if self.bias is None else self.bias.to(inside.dtype)
        if self.padding_mode != "zeros":
            y = F.conv2d(
                F.pad(inside, self.edges, self.padding_mode),
                whole,
                bias,
                self.stride,
                0,
                self.dilation,
                self.groups,
            )
        else:
            y = F.conv2d(inside, whole, bias, self.stride, self.padding, self.dilation, self.groups)
        return given.output(y.to(x.dtype))

    def _product(
        self,
        part: AbstractPackedWeight,
        x: Tensor,
        bias: Tensor | None,
        bits: int,
        low: Tensor | None,
        high: Tensor | None,
    ) -> Tensor:
        assert not isinstance(self.padding, str)
        over = ConvolutionShape(self.kernel_size, self.stride, self.padding, self.dilation)
        return part.conv2d_rounded(x, bias, bits, low, high, over)


class QuantConvolution(_Layer):
    """A convolution of one or three dimensions, or a transposed one, with a packed weight: computed
    with the widened weight.
    """

    def __init__(
        self,
        scheme: Scheme,
        source: Convolution,
        axis: int,
        splits: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(scheme, source, axis, splits, device)
        self.in_channels, self.out_channels, self.groups = (
            source.in_channels,
            source.out_channels,
            source.groups,
        )
        self.kernel_size, self.stride, self.padding, self.dilation = (
            source.kernel_size,
            source.stride,
            source.padding,
            source.dilation,
        )
        self.transposed, self.output_padding = source.transposed, source.output_padding
        self.padding_mode, self.edges = (
            source.padding_mode,
            [] if source.transposed else list(source._reversed_padding_repeated_twice),
        )
        self.devices = frozenset()

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution that it stands for, in the type of `x`."""
        given = Given(x) if self.input is None else self.input(x, rounds=True)
        inside = products.fast_float(given.x)
        whole = _whole(self.weights, self.shape, self.axis, self.splits, inside.dtype)
        bias = None if self.bias is None else self.bias.to(inside.dtype)
        convolve = _CONVOLVE[len(self.kernel_size), self.transposed]
        padding: Any = self.padding
        y: Tensor
        if self.transposed:
            more: tuple[Any, ...] = (self.output_padding, self.groups, self.dilation)
        else:
            more = (self.dilation, self.groups)
            if self.padding_mode != "zeros":
                inside, padding = F.pad(inside, self.edges, self.padding_mode), 0
        y = convolve(inside, whole, bias, self.stride, padding, *more)
        return given.output(y.to(x.dtype))


QuantLayer = QuantLinear | QuantConv2d | QuantConvolution


def empty_layer(
    source: nn.Module, scheme: Scheme, axis: int, splits: Sequence[int], device: torch.device | str
) -> QuantLayer | None:
    """The packed layer that takes the place of `source`, still empty; None where there is none for
    its class.
    """
    own = type(source).forward
    if isinstance(source, nn.Linear):
        return QuantLinear(scheme, source, splits, device) if own is nn.Linear.forward else None
    if isinstance(source, nn.Conv2d):
        return QuantConv2d(scheme, source, splits, device) if own is nn.Conv2d.forward else None
    known = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if isinstance(source, known) and any(own is kind.forward for kind in known):
        return QuantConvolution(scheme, source, axis, splits, device)
    return None
