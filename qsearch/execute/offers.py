"""Offers: the schemes that a tool has, found by asking its exporter about every format in every
granularity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..core import plugins
from ..core.cost import can_have
from ..core.errors import QSearchError
from ..core.format_words import formats
from ..core.graph import LayerSpec
from ..core.scheme import Scheme
from .exporting import AbstractExporter, transforms

_GRAINS = ("-c", "-t", "-g16", "-g32", "-g64", "-g128")
#: of inputs: {} stands for the weight's own format, in its own groups
_INPUTS = ("", "+a8", "+a8t", "+a6", "+a4", "+ae4m3", "+ae4m3t", "+aint8", "+a{form}{group}")
#: layers of common sizes, where no model is given
TYPICAL = (
    LayerSpec("linear", "feed-forward-in", "linear", (1024, 1024), 0),
    LayerSpec("conv2d", "resnet-conv", "conv2d", (320, 320, 3, 3), 0),
)


@dataclass(frozen=True)
class Offer:
    """A scheme that a tool has.

    Attributes:
        scheme: the scheme.
        share: of the layers' weights, how many can have it, in [0, 1].
        bits: stored bits a weight, of these.
        kinds: kinds of layer that can have it, e.g. ("linear",).
        transforms: what the tool takes with it besides, e.g. ("~rotate",).
    """

    scheme: Scheme
    share: float
    bits: float
    kinds: tuple[str, ...]
    transforms: tuple[str, ...] = ()


def candidates() -> list[Scheme]:
    """Every format in the usual granularities, with the usual inputs."""
    found: dict[Scheme, None] = {}
    for form in formats()[1:]:
        for grain, read in itertools.product(("", *_GRAINS), _INPUTS):
            own = read.format(form=form, group=grain[1:] if grain[1:] != "c" else "")
            with suppress(QSearchError):  # its granularity is built in, or its own
                found[Scheme.parse(f"{form}{grain}{own}")] = None
    return list(found)


def offers(to: str | None, layers: Iterable[LayerSpec] = TYPICAL) -> list[Offer]:
    """What the tool `to` has for some of `layers`, fewest bits first; qsearch itself, with inputs
    as they are, for None.

    Raises:
        QSearchError: there is no such exporter.
    """
    plugin: AbstractExporter | None = None
    if to is not None:
        plugin = plugins.load("exporters", plugins.check("exporters", to))
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in layers:
        if layer.quantizable:
            key = (layer.kind, layer.weight_shape, layer.channel_axis, layer.parts)
            groups.setdefault(key, []).append(layer)
    whole = sum(x.weights for held in groups.values() for x in held)

    def able(scheme: Scheme) -> list[LayerSpec]:
        return [
            x
            for held in groups.values()
            if can_have(held[0], scheme)
            and (plugin is None or plugin.nearest(scheme, held[0]) == scheme)
            for x in held
        ]

    found = []
    for plain in candidates():
        if plugin is None and plain.activation:
            continue
        has = {plain: able(plain)}
        if plugin is not None:
            has |= {scheme: able(scheme) for scheme in _transformed(plain, transforms(plugin))}
        words = tuple("~" + "~".join(s.transforms) for s in has if s.transforms and has[s])
        for scheme in [plain] if has[plain] else has:
            if has[scheme]:
                found.append(_offer(scheme, has[scheme], whole, words if has[plain] else ()))
    return sorted(found, key=lambda offer: (offer.bits, str(offer.scheme)))


def _transformed(plain: Scheme, words: Iterable[str]) -> Iterator[Scheme]:
    for word in words:
        with suppress(QSearchError):  # the format or its grain takes none
            yield Scheme.parse(f"{plain}{word}")


def _offer(
    scheme: Scheme, layers: Sequence[LayerSpec], whole: int, words: tuple[str, ...]
) -> Offer:
    weights = sum(x.weights for x in layers)
    bits = sum(scheme.stored_bits(x.weight_shape, x.channel_axis, x.parts) for x in layers)
    kinds = tuple(sorted({x.kind for x in layers}))
    return Offer(scheme, weights / whole, bits / weights, kinds, words)


def ladder(found: Iterable[Offer], most: int = 4) -> list[Offer]:
    """A few offers to measure first: for each number of bits the one that most weights can have,
    inputs as they are before rounded ones.
    """
    by_bits: dict[int, Offer] = {}
    for offer in found:
        known = by_bits.get(offer.scheme.bits)
        if known is None or _rank(offer) < _rank(known):
            by_bits[offer.scheme.bits] = offer
    kept = sorted(by_bits)
    while len(kept) > most:  # the ends stay, and what lies closest to its neighbour goes
        gaps = {kept[i]: kept[i + 1] - kept[i - 1] for i in range(1, len(kept) - 1)}
        kept.remove(min(gaps, key=lambda bits: (gaps[bits], -bits)))
    return [by_bits[bits] for bits in kept]


def _rank(offer: Offer) -> tuple[object, ...]:
    """Inputs as they are, most weights, integers with a zero point before those without, per
    channel before groups.
    """
    s = offer.scheme
    family = {"uint": 0, "int": 1, "float": 2, "block": 3}.get(s.family, 4)
    return (bool(s.activation), -round(offer.share, 3), s.group == -1, family, round(offer.bits, 2))
