"""How long each layer takes with each scheme on this machine: a latency table by stopwatch, for
budgets in seconds.

Layers are timed alone, at the shapes that one call of the model gives them, with random weights:
how long a product takes does not depend on what is in it. Layers of one shape are timed once. What
no scheme changes (`rest`) is a whole call of the model less its layers, where the model has
weights.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsearch_kernels import bench

from ..choices.packed_weight import packed_weight
from ..choices.quantization import quantize_parts
from ..core.cost import can_have
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.latency import Latency
from ..core.scheme import KEEP, Scheme
from ..execute.layers import Convolution, QuantLayer, empty_layer
from ..execute.slower import check_products
from .attention_timing import time_attentions


def kernels(device: str, seconds: float) -> list[dict[str, Any]]:
    """The products of `qsearch_kernels.bench` at its shapes."""
    check(device)
    return bench.table(device=device, seconds=seconds)


@torch.no_grad()
def time_layers(
    model: nn.Module,
    graph: OpGraph,
    inputs: Mapping[str, Any],
    schemes: Iterable[Scheme | str],
    *,
    device: str = "cpu",
    seconds: float = 0.3,
) -> tuple[Latency, list[dict[str, Any]]]:
    """A latency table of `graph` and, for people, a row for each shape: how often it is there, and
    ms with each scheme.

    `inputs`: arguments of one call; with a model on the meta device they are shapes alone, and the
    table's `rest` is 0. `device`: of the stopwatch.
    """
    check(device)
    asked = list(dict.fromkeys([KEEP, *(Scheme.parse(s) for s in schemes)]))
    attentions = [s for s in asked if s.attention]
    asked = [s for s in asked if not s.attention]
    calls = _shapes(model, graph, inputs)
    seconds_of: dict[str, dict[str, float]] = {layer.name: {} for layer in graph}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layer in graph:
        choices = [s for s in asked if can_have(layer, s)] if layer.quantizable else [KEEP]
        source = model.get_submodule(layer.name)
        if layer.name not in calls or not isinstance(source, nn.Linear | Convolution):
            seconds_of[layer.name] = {
                str(scheme): 0.0 for scheme in choices
            }  # not run, or looked up: nothing that a scheme changes
            continue
        for shape in calls[layer.name]:
            key = (
                type(source).__name__,
                layer.weight_shape,
                shape,
                layer.parts,
                getattr(source, "stride", None),
                tuple(choices),
            )
            if key not in rows:
                taken = _timed(source, layer, shape, choices, device, seconds)
                rows[key] = {
                    "layer": type(source).__name__,
                    "weight": "x".join(map(str, layer.weight_shape)),
                    "input": "x".join(map(str, shape)),
                    "calls": 0,
                    **taken,
                }
            rows[key]["calls"] += 1
            for scheme in choices:
                seconds_of[layer.name][str(scheme)] = (
                    seconds_of[layer.name].get(str(scheme), 0.0) + rows[key][str(scheme)] / 1e3
                )
    rest = 0.0
    if not any(p.is_meta for p in model.parameters()):
        whole = statistics.median(
            bench.race({"whole": lambda: model(**inputs)}, seconds, device)["whole"]
        )
        rest = max(0.0, whole - sum(row[str(KEEP)] for row in seconds_of.values()))
    if attentions:
        times, more = time_attentions(graph, attentions, device=device, seconds=seconds)
        seconds_of |= times
        rows |= {("attention", i): row for i, row in enumerate(more)}
    title = (
        f"{torch.cuda.get_device_name() if torch.device(device).type == 'cuda' else _processor()}, "
        f"{torch.get_num_threads()} threads, measured"
    )
    return Latency(graph.id, title, seconds_of, rest, graph.sizes), list(rows.values())


def check(device: str) -> None:
    """Raise `QSearchError` for a device that is not here, and a `QSEARCH_PRODUCTS` that says no
    product.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise QSearchError(
            f"a device to time on must be here; {device!r} is not "
            f"({str(error).splitlines()[0]}); use --device cpu"
        ) from None
    if torch.device(device).type == "cpu":
        check_products()


def _processor() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name", "CPU"))


def _shapes(
    model: nn.Module, graph: OpGraph, inputs: Mapping[str, Any]
) -> dict[str, list[tuple[int, ...]]]:
    """Layer -> the shapes of its inputs in one call of the model."""
    found: dict[str, list[tuple[int, ...]]] = {}

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(x, Tensor):
                found.setdefault(name, []).append(tuple(x.shape))

        return before

    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            hook(layer.name), with_kwargs=True
        )
        for layer in graph
        if layer.calls and layer.quantizable
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _timed(
    source: nn.Module,
    layer: LayerSpec,
    shape: tuple[int, ...],
    schemes: list[Scheme],
    device: str,
    seconds: float,
) -> dict[str, float]:
    """Scheme -> median ms of one call on random numbers of `shape`."""
    full = copy.deepcopy(source).to_empty(device=device)
    for parameter in full.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(shape, device=device, dtype=next(full.parameters()).dtype)
    racers = {
        str(scheme): full if scheme == KEEP else random_layer(full, scheme, layer)
        for scheme in schemes
    }
    # a tensor object each: layers that are given one round it once, and the first would pay for all
    taken = bench.race(
        {name: partial(module, x.view_as(x)) for name, module in racers.items()}, seconds, device
    )
    return {name: statistics.median(times) * 1e3 for name, times in taken.items()}


def random_layer(source: nn.Module, scheme: Scheme, spec: LayerSpec) -> QuantLayer:
    """A packed layer of the shape of `source`, with its weight rounded to nearest and an input's
    input quantizer that is not calibrated: for timing.
    """
    device = next(source.parameters()).device
    made = empty_layer(source, scheme, spec.channel_axis, spec.parts, device)
    if made is None:
        raise QSearchError(
            f"linear layers and convolutions of torch have a packed form; {spec.name} is "
            f"{type(source).__name__}"
        )
    if scheme.format != "keep":
        plain, weight = replace(scheme.weight_only, method=""), source.get_parameter("weight")
        for i, quantized in enumerate(
            quantize_parts(
                weight, plain, axis=spec.channel_axis, splits=spec.parts, layer=spec.name
            )
        ):
            made.parts[i] = packed_weight(quantized)
    if made.input is not None:
        for name, held in made.input.layout.items():
            made.input.get_buffer(name).fill_(held.typical)
    return made
