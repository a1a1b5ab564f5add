"""simulate(model, plan): the model computes as if its weights were stored by the plan, in plain torch, undone on exit.

What profiling measures and what the runtime must reproduce. Weights are exchanged by pointer, so that entering and
leaving copies nothing; inputs are rounded in forward hooks. An exception on the way leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import Scheme
from .calibration import LayerInputs
from .quantization import Quantized, joined, quantize_parts
from .treatment import Treatment, named, treat


class QuantizedWeights:
    """The simulated weights of a model's layers, computed once for each (layer, scheme) and kept.

    `calibration`: what goes into the layers, from `calibrate`; wanted by methods, static ranges and transforms that go by it.
    """

    def __init__(self, model: nn.Module, graph: OpGraph, calibration: Mapping[str, LayerInputs] | None = None) -> None:
        self.model, self.graph, self.calibration = model, graph, calibration or {}
        self._weights: dict[tuple[str, str], Tensor] = {}
        self._treatments: dict[tuple[str, str], Treatment | None] = {}

    def get(self, layer: str, scheme: Scheme) -> Tensor:
        """Weight of `layer` as `scheme` stores it, in the weight's own shape, dtype and device; itself where it is kept."""
        if scheme.format == "keep":
            return weight_of(self.model, layer).data
        key = (layer, str(scheme if scheme.transforms else scheme.weight_only))
        if key not in self._weights:
            self._weights[key] = self._make(layer, scheme)
        return self._weights[key]

    def treatment(self, layer: str, scheme: Scheme) -> Treatment | None:
        """What `scheme` does to the input of `layer`; None where it does nothing."""
        key = (layer, str(scheme))
        if key not in self._treatments:
            weight = weight_of(self.model, layer).data
            module, inputs = self.model.get_submodule(layer), self.calibration.get(layer)
            self._treatments[key] = treat(scheme, weight, module, inputs, layer=layer, transforms=named(scheme))
        return self._treatments[key]

    def codes(self, layer: str, scheme: Scheme) -> tuple[Quantized, ...]:
        """What is stored of the layer's weight: a part for each part of its input, times the scale that the scheme's transforms move into it."""
        weight, spec = weight_of(self.model, layer).data, self.graph.layer(layer)
        inputs, scale = self.calibration.get(layer), None
        if scheme.transforms and (treatment := self.treatment(layer, scheme)) is not None:
            inputs, scale = treatment.inputs, _columns(treatment, weight)
        return quantize_parts(
            weight if scale is None else weight.float() * scale,
            scheme,
            axis=spec.channel_axis,
            splits=spec.parts,
            layer=layer,
            moments=None if inputs is None else inputs.moments,
        )

    def forget(self, layer: str) -> None:
        """Free what is kept of a layer."""
        for kept in (self._weights, self._treatments):
            for key in [key for key in kept if key[0] == layer]:
                del kept[key]

    def _make(self, layer: str, scheme: Scheme) -> Tensor:
        weight, parts = weight_of(self.model, layer).data, self.codes(layer, scheme)
        treatment = self.treatment(layer, scheme) if scheme.transforms else None
        return joined(parts, weight.dtype) if treatment is None else (joined(parts) / _columns(treatment, weight)).to(weight.dtype)


def _columns(treatment: Treatment, weight: Tensor) -> Tensor:
    """The scale of each input channel, in a shape that spreads over the weight."""
    return treatment.scale.view(1, -1, *[1] * (weight.ndim - 2))


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight parameter of a layer. Raises `QSearchError` when the model has no such layer."""
    try:
        weight = model.get_submodule(layer).weight
    except AttributeError:
        raise QSearchError(f"{type(model).__name__} has no layer {layer!r} with a weight; extract its graph again") from None
    assert isinstance(weight, nn.Parameter)
    return weight


@contextmanager
def exchanged(weight: nn.Parameter, value: Tensor) -> Iterator[None]:
    """`weight` holds `value` inside the block and its own data again after it."""
    own = weight.data
    weight.data = value
    try:
        yield
    finally:
        weight.data = own


@contextmanager
def treated(module: nn.Module, treatment: Treatment, full: Tensor, weight: Tensor) -> Iterator[None]:
    """`module` rounds its input as `treatment` says inside the block; `full` and `weight` are its weight as it is and as it is simulated."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (treatment.before(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return (), {**kwargs, name: treatment.before(kwargs[name])}

    def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return treatment.after(y, module, full, weight)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def simulate(model: nn.Module, plan: BitPlan | Mapping[str, Scheme], graph: OpGraph, weights: QuantizedWeights | None = None) -> Iterator[nn.Module]:
    """`model` with every weight as the plan stores it and every input rounded as it says, inside the block.

    `plan` may be sparse (layers it does not name are kept); `weights` shares quantized weights between calls, and holds the calibration that
    some schemes need. Everything is made before anything is exchanged, so that what a layer gets does not depend on the others.
    """
    if isinstance(plan, BitPlan) and plan.graph != graph.id:
        raise QSearchError(f"the plan was made for graph {plan.graph}, {graph.model} is graph {graph.id}; make a plan for this model")
    weights = weights or QuantizedWeights(model, graph)
    layers = plan.layers if isinstance(plan, BitPlan) else plan
    with ExitStack() as stack, torch.no_grad():
        made = []
        for layer, scheme in layers.items():
            graph.layer(layer)  # a name that means nothing is a mistake, also where it would be kept
            if scheme.format != "keep" or scheme.activation:
                made.append((layer, weight_of(model, layer), weights.get(layer, scheme), weights.treatment(layer, scheme)))
        for layer, weight, value, treatment in made:
            if treatment is not None:
                stack.enter_context(treated(model.get_submodule(layer), treatment, weight.data, value))
            stack.enter_context(exchanged(weight, value))
        yield model
