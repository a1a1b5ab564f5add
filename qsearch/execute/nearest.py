"""The nearest scheme that a tool has, for a scheme that it lacks: as few bits as are not fewer,
then the same kind of code, then the same groups.

One rule for all exporters. A tool lists what it offers for a layer; precision is lost only where it
has nothing as precise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ..core import plugins
from ..core.graph import LayerSpec
from ..core.scheme import KEEP, Scheme


def nearest(scheme: Scheme, layer: LayerSpec, offers: Iterable[Scheme]) -> Scheme:
    """`scheme`, where its format is among `offers` (or it is `keep`), else the nearest of them; its
    method stays where that can make the format.

    Transforms of the input go: no tool's file holds them. A layer that can't be quantized is kept.
    """
    if not layer.quantizable:
        return KEEP
    plain = replace(scheme, method="", transforms=())
    known = [KEEP, *offers]
    chosen = (
        plain if plain in known else min(known, key=lambda offer: _distance(plain, offer, layer))
    )
    if (
        scheme.method
        and chosen != KEEP
        and plugins.load("quantizers", scheme.method).supports(chosen)
    ):
        return replace(chosen, method=scheme.method)
    return chosen


def whole(scheme: Scheme) -> Scheme:
    """The scheme without a method whose zero points are fractions (such as HQQ), for tools that
    store them as integers.
    """
    if scheme.method and not plugins.load("quantizers", scheme.method).integer_zeros:
        return replace(scheme, method="")
    return scheme


def _distance(scheme: Scheme, offer: Scheme, layer: LayerSpec) -> tuple[float, ...]:
    coarser = offer.bits < scheme.bits or offer.activation_bits < scheme.activation_bits
    inputs = abs(offer.activation_bits - scheme.activation_bits)
    other = (
        (offer.family != scheme.family)
        + (offer.activation != scheme.activation)
        + (offer.grain != scheme.grain)
    )
    return (
        coarser,
        abs(offer.bits - scheme.bits),
        inputs,
        other,
        abs(math.log(_size(scheme, layer) / _size(offer, layer))),
        offer.stored_bits(layer.weight_shape),
    )


def _size(scheme: Scheme, layer: LayerSpec) -> float:
    """Weights that share a scale."""
    return layer.weights / max(
        1, scheme.groups(layer.weight_shape, layer.channel_axis, layer.parts)
    )


def nearest_node(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """The nearest that a graph of standard nodes says (ONNX, OpenVINO): integers of 4 and 8 bits
    and e4m3, a channel or, of integers, in groups.

    Inputs in 8 bits per tensor where weights are integers; that of a long skip has a range for each
    part, and a node has one.
    """
    if layer.kind not in ("linear", "conv1d", "conv2d", "conv3d") or layer.channel_axis != 0:
        return nearest(scheme, layer, [])
    sizes = [
        "c",
        *(
            f"g{g}"
            for g in sorted({16, 32, 64, 128, 256, *([scheme.group] if scheme.group > 0 else [])})
            if divides(g, layer)
        ),
    ]
    inputs = ("",) if layer.parts else ("", "+a8t")
    names = [
        f"{form}-{size}{read}"
        for form in ("int4", "uint4", "int8", "uint8")
        for size in sizes
        for read in inputs
    ]
    return nearest(whole(scheme), layer, map(Scheme.parse, ["e4m3-c", *names]))


def width(layer: LayerSpec) -> int:
    """Weights of one output channel."""
    return layer.weights // max(1, layer.weight_shape[layer.channel_axis])


def divides(group: int, layer: LayerSpec) -> bool:
    """Whether groups of that size fill the rows of a layer, and of each part of a long skip,
    without a rest.
    """
    taps = width(layer) // max(1, layer.weight_shape[1 - layer.channel_axis]) if layer.parts else 1
    return width(layer) >= group and all(
        part % group == 0 for part in ([n * taps for n in layer.parts] or [width(layer)])
    )
