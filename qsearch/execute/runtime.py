"""apply(model, plan, graph): layers become packed ones, whose memory is the plan's and whose arithmetic is low-bit where the machine has it.

Codes, scales and what transforms keep are made by the same functions that `simulate` shows, so that the two agree to the rounding of floating point.
Where a plan rounds inputs and there is no kernel that multiplies what is left, the layer computes with its widened weight: the same numbers and the same
memory, none of the speed. That is said in one `WidenedWarning`, or refused with `kernels="required"`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import Scheme
from ..core.sites import parted
from ..measure.simulation import QuantizedWeights, weight_of
from .layers import Convolution, QuantConv2d, QuantConvolution, QuantLayer, QuantLinear, empty_layer
from .packing import PackedWeight, stored_bytes

__all__ = [
    "QuantConv2d",
    "QuantConvolution",
    "QuantLinear",
    "WidenedWarning",
    "apply",
    "packed_layers",
    "place_empty",
    "stored_bytes",
]
Kernels = Literal["preferred", "required"]


class WidenedWarning(UserWarning):
    """Layers whose inputs a plan rounds compute in floating point, since the machine has no kernel for what it asks."""


@torch.no_grad()
def apply(
    model: nn.Module,
    plan: BitPlan | Mapping[str, Scheme],
    graph: OpGraph,
    weights: QuantizedWeights | None = None,
    *,
    kernels: Kernels = "preferred",
) -> nn.Module:
    """Replace the layers of `model`, in place, by packed ones; returns it. Layers that the plan keeps, or does not name, stay as they are.

    `weights`: of this model, with the calibration that some schemes ask for, or with what reconstruction learnt (as for `simulate`). Raises
    `QSearchError` for a plan of another graph, for what has no packed form (layers of other classes, ranges of steps, attention's own tensors), and,
    with `kernels="required"`, where a layer would have to widen its weight.
    On an error the model may hold some packed layers already: a weight is freed as soon as it is packed, so that memory never holds both.
    """
    if isinstance(plan, BitPlan) and plan.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {plan.graph}, {graph.model} is graph {graph.id}; make a plan for this model"
        )
    if weights is not None and weights.model is not model:
        raise QSearchError(
            "codes are made of the weights of the model that is packed; the weights given are of another model, make them of this one"
        )
    layers, sites = parted(
        graph, {**plan.layers, **plan.sites} if isinstance(plan, BitPlan) else plan
    )
    if rounded := sorted(site for site, scheme in sites.items() if scheme.activation):
        raise QSearchError(
            f"packed layers round their own inputs, not attention's tensors; keep {rounded[0]}, or stay with `simulate`"
        )
    schemes = _packed(layers)
    weights = weights or QuantizedWeights(model, graph)
    splits = {name: graph.layer(name).parts for name in schemes}
    _check_kernels(_templates(model, graph, schemes, splits), kernels)
    for name, scheme in schemes.items():
        source = model.get_submodule(name)
        device = weight_of(model, name).device
        layer = _empty(source, name, scheme, graph.layer(name).channel_axis, splits[name], device)
        _fill(layer, source, weights, name, scheme)
        for alias in graph.layer(name).aliases:
            _share(model, alias, layer, graph)
        replace_layer(model, source, layer)
        weights.forget(name)
    return model


def place_empty(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    axes: Mapping[str, int],
    splits: Mapping[str, Sequence[int]],
    device: torch.device | str = "meta",
) -> nn.Module:
    """`apply` without weights: packed layers on `device` (meta: shapes alone), to be filled by a state dict. `axes`: output channels, 0 where not named."""
    for name, scheme in schemes.items():
        source = model.get_submodule(name)
        replace_layer(
            model,
            source,
            _empty(source, name, scheme, axes.get(name, 0), splits.get(name, ()), device),
        )
    return model


def packed_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Name -> packed layer, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | QuantConv2d | QuantConvolution)
    }


def warn_of_widened(
    layers: Iterable[tuple[str, QuantLayer]], device: torch.device | str, kernels: Kernels
) -> None:
    """Say, or refuse, that layers whose inputs are rounded have no kernel on `device` and widen their weights."""
    kind = torch.device(device).type
    found = [
        (name, layer)
        for name, layer in layers
        if layer.scheme.activation and kind != "meta" and kind not in layer.devices
    ]
    if not found:
        return
    name = found[0][0]
    text = ", ".join(
        f"{scheme} ({count})"
        for scheme, count in Counter(str(x.scheme) for _, x in found).most_common(4)
    )
    rule = "products of low-bit inputs need whole numbers of 8 bits and one scale a row of weights"
    if kind == "cuda" and any(isinstance(layer, QuantConv2d) for _, layer in found):
        rule += " (a convolution on cuda: symmetric ones, and one stride, padding and dilation for both axes)"
    rule += f"; {kind} has no kernel for {text}, first at {name}"
    if kernels == "required":
        raise QSearchError(
            f'{rule}: use int or uint formats with -c and +a8, or kernels="preferred"'
        )
    cost = "each call widens the weight and multiplies in floating point: no faster than full precision, up to twice its time at few rows"
    warnings.warn(
        f"{rule}; {cost}. The numbers and the memory are the plan's.", WidenedWarning, stacklevel=3
    )


def _packed(layers: Mapping[str, Scheme]) -> dict[str, Scheme]:
    for name, scheme in layers.items():
        if scheme.ranges > 1:
            raise QSearchError(
                f"a packed layer holds one weight for all steps; {scheme} at {name} has {scheme.ranges}, stay with `simulate`"
            )
    return {
        name: scheme
        for name, scheme in layers.items()
        if scheme.format != "keep" or scheme.activation
    }


def _templates(
    model: nn.Module,
    graph: OpGraph,
    schemes: Mapping[str, Scheme],
    splits: Mapping[str, Sequence[int]],
) -> list[tuple[str, QuantLayer, torch.device]]:
    """Every layer to be, on the meta device, so that what can't be done is said before anything is done."""
    made = []
    for name, scheme in schemes.items():
        weight = weight_of(model, name)
        made.append(
            (
                name,
                _empty(
                    model.get_submodule(name),
                    name,
                    scheme,
                    graph.layer(name).channel_axis,
                    splits[name],
                    "meta",
                ),
                weight.device,
            )
        )
    return made


def _check_kernels(made: list[tuple[str, QuantLayer, torch.device]], kernels: Kernels) -> None:
    for device in dict.fromkeys(device for _, _, device in made):
        warn_of_widened(
            [(name, layer) for name, layer, where in made if where == device], device, kernels
        )


def _empty(
    source: nn.Module,
    name: str,
    scheme: Scheme,
    axis: int,
    splits: Sequence[int],
    device: torch.device | str,
) -> QuantLayer:
    layer = empty_layer(source, scheme, axis, splits, device)
    if layer is None:
        raise QSearchError(
            f"linear layers and convolutions of torch have a packed form; {name} is {type(source).__name__}: keep it"
        )
    return layer


def _fill(
    layer: QuantLayer, source: nn.Module, weights: QuantizedWeights, name: str, scheme: Scheme
) -> None:
    """Codes, scales, the shift's bias and the first token's output, from what `simulate` would show."""
    assert isinstance(source, nn.Linear | Convolution)
    weight, bias = source.weight.data, source.bias
    treatment = weights.treatment(name, scheme)
    if scheme.format != "keep":
        for i, quantized in enumerate(weights.codes(name, scheme)):
            layer.parts[i] = PackedWeight.of(quantized)
    if treatment is None or layer.input is None:
        return
    token: Tensor | None = None
    if treatment.first is not None:
        token = F.linear(treatment.first.to(weight), weight, bias)
    layer.input.fill(treatment, token)
    if layer.input.shift is not None:
        moved = F.linear(treatment.shift.to(weight), weight, bias)
        layer.bias = nn.Parameter(moved, requires_grad=False)


def _share(model: nn.Module, alias: str, layer: QuantLayer, graph: OpGraph) -> None:
    """Another module with the same weight gets the same packed parts, and keeps its own bias and its own untouched input."""
    source = model.get_submodule(alias)
    spec = next(x for x in graph if alias in x.aliases)
    other = _empty(source, alias, layer.scheme.weight_only, spec.channel_axis, layer.splits, "meta")
    if layer.input is not None and layer.input.divisor is not None:
        raise QSearchError(
            f"{spec.name} and {alias} share one weight, and {layer.scheme} moves a scale into it that {alias} knows nothing of; use no transform"
        )
    other.parts = layer.parts
    replace_layer(model, source, other)


def replace_layer(model: nn.Module, source: nn.Module, layer: nn.Module) -> None:
    """Put `layer` wherever `source` stands."""
    layer.train(source.training)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is source:
                setattr(parent, name, layer)
