"""Quantized: a weight as codes, and the contract of everything that makes them.

A weight is seen as rows: its channel axis first, the rest flattened, cut into groups that share a
scale or a codebook. A plug-in in `quantizers/` gets those groups and a scheme, and returns `Codes`;
where a scheme names none, its format does. Padding and shapes are settled here. A method that
chooses by what goes into the layer (GPTQ, AdaRound) says `needs_inputs = True` and is given the
second moments of those inputs as well: the squared error of a layer's output is tr(E H E^T) for a
weight error E, whatever the inputs were beyond their moments H = mean(x x^T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core import plugins
from ..core.errors import QSearchError
from ..core.scheme import Scheme
from .codes import AbstractCodes
from .format import format_of
from .learnt_rounding import Gates


@dataclass(frozen=True)
class Quantized:
    """A weight as codes: `code` holds them by groups, `shape` and `axis` say how to lay the rows
    out again.
    """

    code: AbstractCodes
    scheme: Scheme
    shape: tuple[int, ...]
    axis: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [shape] that the codes stand for."""
        return from_groups(self.code.values(), self.shape, self.axis).to(dtype)


class AbstractQuantizer(Protocol):
    """What a module in `quantizers/` provides. Its contract is `qsearch.testing.QuantizerContract`.

    Constants:
        needs_inputs: whether `quantize` takes a third argument, `moments`: the mean of x x^T over
            the inputs x that a row is multiplied with, [columns, columns].
        integer_zeros: whether zero points are whole numbers, as tools store them that keep them as
            integers.
        learns_blocks: whether a reconstruction can learn its rounding block by block; then it is an
            `AbstractLearntQuantizer`.
    """

    needs_inputs: bool
    integer_zeros: bool
    learns_blocks: bool

    def supports(self, scheme: Scheme) -> bool:
        """Whether this method can carry out the scheme's format."""
        ...

    def quantize(self, groups: Tensor, scheme: Scheme, *moments: Tensor) -> AbstractCodes:
        """Codes of fp32 groups [rows, groups, group]."""
        ...


class AbstractLearntQuantizer(AbstractQuantizer, Protocol):
    """A quantizer whose rounding is learnt by gradients: what `measure.reconstruction` uses of
    it.
    """

    def gates(self, groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Gates:
        """Variables for the rounding of fp32 groups [rows, groups, group] on the grid of `scale`
        and `zero`.
        """
        ...


def learnt_method(scheme: Scheme) -> AbstractLearntQuantizer | None:
    """The plug-in that a scheme names, where its rounding is learnt block by block; else None."""
    if not scheme.method or scheme.format == "keep":
        return None
    plugin: AbstractLearntQuantizer = plugins.load("quantizers", scheme.method)
    return plugin if plugin.learns_blocks and plugin.supports(scheme) else None


def to_groups(weight: Tensor, scheme: Scheme, axis: int = 0) -> Tensor:
    """Weight -> fp32 [rows, groups, group]; an incomplete last group is filled with the row's last
    weight, which moves no range.
    """
    rows = (
        weight.detach().float().movedim(axis, 0).flatten(1)
        if weight.ndim > 1
        else weight.detach().float()[None]
    )
    if scheme.group == -1:
        return rows.reshape(1, 1, -1)
    size = scheme.group or rows.shape[1]
    missing = -rows.shape[1] % size
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
    return rows.reshape(rows.shape[0], -1, size)


def from_groups(groups: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Inverse of `to_groups`."""
    moved = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
    row = math.prod(moved[1:])
    flat = (
        groups.reshape(moved[0], -1)[:, :row]
        if groups.shape[0] != 1
        else groups.flatten()[: math.prod(moved)]
    )
    weight: Tensor = flat.reshape(moved).movedim(0, axis)
    return weight


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    axis: int = 0,
    layer: str = "the weight",
    moments: Tensor | None = None,
) -> Quantized:
    """Quantize one weight; `layer` names it in errors, `moments` [columns, columns] are what
    methods that look at the layer's inputs go by.

    Raises `QSearchError` for weights that are not finite, for a scheme that no method here can
    carry out, and where moments are wanted and missing.
    """
    if scheme.family == "keep":
        raise QSearchError(f"{layer} is kept in full precision; there is nothing to quantize")
    if not torch.isfinite(weight).all():
        raise QSearchError(
            f"weights must be finite to be quantized; {layer} holds "
            f"{int((~torch.isfinite(weight)).sum())} that are not"
        )
    plugin, method = method_of(scheme), scheme.method
    if not plugin.supports(scheme):
        raise QSearchError(
            f"{method} can't make {scheme.format} ({layer}, scheme {scheme}); see "
            "`qsearch list quantizers`"
        )
    given: tuple[Tensor, ...] = ()
    if plugin.needs_inputs:
        if moments is None:
            raise QSearchError(
                f"{method} looks at what goes into {layer}; give QuantizedWeights(model, "
                "graph, calibrate(model, graph, calls)), "
                "or choose a method that needs no data, such as hqq"
            )
        given = (moments,)
    return Quantized(
        plugin.quantize(to_groups(weight, scheme, axis), scheme, *given),
        scheme,
        tuple(weight.shape),
        axis,
    )


def quantize_parts(
    weight: Tensor,
    scheme: Scheme,
    *,
    axis: int = 0,
    splits: Sequence[int] = (),
    layer: str = "the weight",
    moments: Tensor | None = None,
) -> tuple[Quantized, ...]:
    """`quantize` for each part of a weight whose input is a concatenation of `splits` channels; one
    part where it is none.

    The parts of a long skip differ in range, and one scale would serve the wider one only
    (Q-Diffusion, 2023, section 4.2).
    """
    if not splits:
        return (quantize(weight, scheme, axis=axis, layer=layer, moments=moments),)
    made, begin = [], 0
    for part in weight.split(list(splits), 1 - axis):
        columns = part.numel() // part.shape[axis]
        square = (
            None if moments is None else moments[begin : begin + columns, begin : begin + columns]
        )
        made.append(quantize(part, scheme, axis=axis, layer=layer, moments=square))
        begin += columns
    return tuple(made)


def joined(parts: Sequence[Quantized], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the parts of `quantize_parts` stand for."""
    if len(parts) == 1:
        return parts[0].dequantize(dtype)
    return torch.cat([part.dequantize(dtype) for part in parts], 1 - parts[0].axis)


class _Own:
    """What a scheme's format does by itself, where no method is named: it needs no data."""

    needs_inputs = False
    integer_zeros = True
    learns_blocks = False

    def supports(self, scheme: Scheme) -> bool:
        """Any."""
        return True

    def quantize(self, groups: Tensor, scheme: Scheme, *moments: Tensor) -> AbstractCodes:
        """As the format says."""
        return format_of(scheme).quantize(groups, scheme)


_OWN = _Own()


def method_of(scheme: Scheme) -> AbstractQuantizer:
    """What carries out a scheme: the plug-in that it names, or its format by itself."""
    if not scheme.method:
        return _OWN
    plugin: AbstractQuantizer = plugins.load("quantizers", scheme.method)
    return plugin
