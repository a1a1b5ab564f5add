"""A device's roofline as a latency table: what every scheme makes of every layer's time at best."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.attentions import attention_share, fault_of
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.scheme import KEEP, Scheme
from .costs import Device, Timing, timings


def roofline(graph: OpGraph, on: Device, schemes: Iterable[Scheme | str]) -> Latency:
    """Seconds of each layer with each of `schemes` and with `keep`, by `costs.timings`; layers that
    can't be quantized have `keep` alone.

    Choices of whole attentions among them time the attentions that can have them.
    """
    asked = {KEEP, *(Scheme.parse(s) for s in schemes)}
    attentions = [s for s in asked if s.attention]
    asked -= set(attentions)
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
    if attentions:
        seconds |= _attentions(graph, on, attentions)
    return Latency(graph.id, on.title, seconds, rest, graph.sizes)


def _attentions(
    graph: OpGraph, on: Device, choices: Iterable[Scheme]
) -> dict[str, dict[str, float]]:
    """Seconds of each self-attention that can have one of `choices`: less arithmetic, as many
    bytes.
    """
    timed: dict[str, list[Timing]] = {}
    for one in timings(graph, on):
        if one.kind == "attention":
            timed.setdefault(one.name.rpartition(".")[0], []).append(one)
    found = {}
    for module, spec in graph.self_attentions.items():
        row = {str(KEEP): sum(t.seconds for t in timed[module])}
        for scheme in choices:
            if not fault_of(spec, scheme):
                share = attention_share(spec, scheme)
                row[str(scheme)] = sum(max(share * t.compute, t.memory) for t in timed[module])
        found[spec.site] = row
    return found
