"""simulate(model, plan): the model computes as if its weights were stored by the plan, in plain torch, undone on exit.

What profiling measures and what the runtime must reproduce. Weights are exchanged by pointer, so that entering and
leaving copies nothing, and an exception on the way leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import Scheme
from .quantization import quantize


class QuantizedWeights:
    """The simulated weights of a model's layers, computed once for each (layer, scheme) and kept."""

    def __init__(self, model: nn.Module, graph: OpGraph) -> None:
        self.model, self.graph = model, graph
        self._cache: dict[tuple[str, str], Tensor] = {}

    def get(self, layer: str, scheme: Scheme) -> Tensor:
        """Weight of `layer` as `scheme` stores it, in the weight's own shape, dtype and device."""
        key = (layer, str(scheme.weight_only))
        if key not in self._cache:
            if scheme.activation:
                raise QSearchError(f"{scheme} quantizes the input of {layer}; this version simulates weights only")
            weight = weight_of(self.model, layer)
            made = quantize(weight.data, scheme, axis=self.graph.layer(layer).channel_axis, layer=layer)
            self._cache[key] = made.dequantize(weight.dtype)
        return self._cache[key]


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
def simulate(model: nn.Module, plan: BitPlan | Mapping[str, Scheme], graph: OpGraph, weights: QuantizedWeights | None = None) -> Iterator[nn.Module]:
    """`model` with every weight as the plan stores it, inside the block.

    `plan` may be sparse (layers it does not name are kept); `weights` shares quantized weights between calls.
    """
    if isinstance(plan, BitPlan) and plan.graph != graph.id:
        raise QSearchError(f"the plan was made for graph {plan.graph}, {graph.model} is graph {graph.id}; make a plan for this model")
    weights = weights or QuantizedWeights(model, graph)
    layers = plan.layers if isinstance(plan, BitPlan) else plan
    with ExitStack() as stack, torch.no_grad():
        for layer, scheme in layers.items():
            graph.layer(layer)  # a name that means nothing is a mistake, also where it would be kept
            if scheme.format != "keep" or scheme.activation:
                stack.enter_context(exchanged(weight_of(model, layer), weights.get(layer, scheme)))
        yield model
