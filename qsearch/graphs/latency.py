"""A device's roofline as a latency table: what every scheme makes of every layer's time at best."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.scheme import KEEP, Scheme
from .costs import Device, timings


def roofline(graph: OpGraph, on: Device, schemes: Iterable[Scheme | str]) -> Latency:
    """Seconds of each layer with each of `schemes` and with `keep`, by `costs.timings`; layers that can't be quantized have `keep` alone."""
    asked = {KEEP, *(Scheme.parse(s) for s in schemes)}
    seconds: dict[str, dict[str, float]] = {layer.name: {} for layer in graph}
    rest = 0.0
    for scheme in sorted(asked, key=str):
        timed = timings(graph, on, scheme)
        rest = sum(t.seconds for t in timed if not t.layer)
        for layer in graph:
            if layer.quantizable or scheme == KEEP:
                seconds[layer.name][str(scheme)] = 0.0
        for one in timed:
            if one.layer and str(scheme) in seconds[one.layer]:
                seconds[one.layer][str(scheme)] += one.seconds
    return Latency(graph.id, on.title, seconds, rest, graph.sizes)
