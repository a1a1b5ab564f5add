"""apply(model, plan, graph): layers become packed ones, whose memory is the plan's and whose
arithmetic is low-bit where the machine has it.

Codes, scales and what transforms keep are made by the same functions that `simulate` shows, so that
the two agree to the rounding of floating point. Where a plan rounds inputs and there is no kernel
that multiplies what is left, the layer computes with its widened weight: the same numbers and the
same memory, none of the speed. That is said in one `DequantizeFallbackWarning`, or refused with
`kernels="required"`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from ..choices.packed_weight import packed_weight
from ..core.cost import Choices
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import ONE_RANGE, Plan
from ..core.plan_choices import checked
from ..core.scheme import KEEP, Scheme
from ..core.sites import is_site
from ..measure.quantized_weights import Fit, QuantizedWeights, fits, weight_of
from ..measure.simulation import roots
from ..measure.streaming import present, stream_of, streams_of
from .attentions import follow_attentions
from .layers import Convolution, QuantConv2d, QuantConvolution, QuantLayer, QuantLinear, empty_layer
from .packing import stored_bytes
from .ranged import RangedLayer, follow_steps
from .slower import rows_of, warn_of_slower

__all__ = [
    "DequantizeFallbackWarning",
    "QuantConv2d",
    "QuantConvolution",
    "QuantLinear",
    "apply",
    "packed_layers",
    "place_empty",
    "stored_bytes",
]
Kernels = Literal["preferred", "required"]


class DequantizeFallbackWarning(UserWarning):
    """Layers whose inputs a plan rounds compute in floating point, since the machine has no kernel
    for what it asks.
    """


def __getattr__(name: str) -> type[DequantizeFallbackWarning]:
    if name != "WidenedWarning":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} is DequantizeFallbackWarning since 0.2.0",
        DeprecationWarning,
        stacklevel=2,
    )
    return DequantizeFallbackWarning


@torch.no_grad()
def apply(
    model: nn.Module,
    plan: Plan | Mapping[str, Scheme],
    graph: OpGraph,
    weights: QuantizedWeights | None = None,
    *,
    kernels: Kernels = "preferred",
) -> nn.Module:
    """Replace the layers of `model`, in place, by packed ones.

    Layers that the plan keeps, or does not name, stay as they are. Attentions as a whole are
    computed as the plan says from then on. A weight is freed as soon as it is packed, so that
    memory never holds both; on an error the model may hold some packed layers already.

    Args:
        model: the denoiser (or the container of several components, as `model_of` makes it).
        plan: a plan, or layer -> scheme for some of the layers.
        graph: the model's graph.
        weights: of this model, with the calibration that some schemes ask for, or with what
            reconstruction learnt (as for `simulate`).
        kernels: "preferred" widens a weight where no kernel multiplies it here; "required"
            refuses that.

    Returns:
        The model.

    Raises:
        QSearchError: a plan of another graph, what has no packed form (layers of other classes,
            attention's own tensors), a layer without a kernel where kernels are required.
    """
    if streams_of(model):
        raise QSearchError(
            "a streamed model is packed into its file, a layer at a time: `packed_file.pack`"
        )
    if isinstance(plan, Plan) and plan.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {plan.graph}, {graph.model} is graph "
            f"{graph.id}; make a plan for this model"
        )
    if weights is not None and weights.model is not model:
        raise QSearchError(
            "codes are made of the weights of the model that is packed; the weights "
            "given are of another model, make them of this one"
        )
    steps = plan.steps if isinstance(plan, Plan) else ONE_RANGE
    held = plan.choices if isinstance(plan, Plan) else checked(graph, plan, steps)
    if rounded := sorted(n for n, c in held.items() if is_site(n) and any(s.activation for s in c)):
        raise QSearchError(
            "packed layers round their own inputs, not attention's tensors; keep "
            f"{rounded[0]}, or stay with `simulate`"
        )
    chosen = {n: c for n, c in held.items() if not is_site(n) and c != (KEEP,)}
    weights = weights or QuantizedWeights(model, graph)
    splits = {name: graph.layer(name).parts for name in chosen}
    _check_kernels(_templates(model, graph, chosen, splits), kernels)
    device = torch.device("meta")
    for name, choices in chosen.items():
        source = model.get_submodule(name)
        device = weight_of(model, name).device
        layer = packed_layer(model, graph, weights, name, choices)
        for alias in _others(graph.layer(name)):
            _share(model, alias, layer, graph)
        replace_layer(model, source, layer)
        weights.forget(name)
    follow_steps(model, roots(model, graph), steps)
    warn_where_slower(model, graph, device)
    follow_attentions(model, roots(model, graph), graph, held, steps, weights.drifts)
    return model


def packed_layer(
    model: nn.Module, graph: OpGraph, weights: QuantizedWeights, name: str, choices: Choices
) -> QuantLayer | RangedLayer:
    """The packed form of one layer of a model, which stays as it is."""
    source, spec = model.get_submodule(name), graph.layer(name)
    device = weight_of(model, name).device
    with present(source):
        layer = _empty_choices(source, name, choices, spec.channel_axis, spec.parts, device)
        for i, fit in enumerate(fits(choices)):
            one = layer if not isinstance(layer, RangedLayer) else layer.layers[i]
            own = not isinstance(layer, RangedLayer) or layer.owners[i] == i
            _fill(one, source, weights, name, fit, own=own)
        for module in layer.modules():  # what it has in common with a layer that is let go
            for own_name, parameter in module._parameters.items():
                if parameter is not None and stream_of(parameter) is not None:
                    held = nn.Parameter(parameter.data, requires_grad=False)
                    module._parameters[own_name] = held
    if isinstance(layer, RangedLayer):
        layer.share()
    return layer


def warn_where_slower(model: nn.Module, graph: OpGraph, device: torch.device | str) -> None:
    """`warn_of_slower` for the packed layers of a model that lies on a CPU."""
    if torch.device(device).type == "cpu":
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        layers = packed_layers(model).items()
        warn_of_slower(layers, next(floats, torch.float32), rows_of(graph))


def place_empty(
    model: nn.Module,
    choices: Mapping[str, Choices],
    axes: Mapping[str, int],
    splits: Mapping[str, Sequence[int]],
    device: torch.device | str = "meta",
) -> nn.Module:
    """`apply` without weights: packed layers on `device` (meta: shapes alone), to be filled by a
    state dict. `axes`: output channels, 0 where not named.
    """
    for name, held in choices.items():
        source = model.get_submodule(name)
        layer = _empty_choices(source, name, held, axes.get(name, 0), splits.get(name, ()), device)
        replace_layer(model, source, layer)
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
    """Say, or refuse, that layers whose inputs are rounded have no kernel on `device` and widen
    their weights.
    """
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
        rule += (
            " (a convolution on cuda: symmetric ones, and one stride, padding and dilation for "
            "both axes)"
        )
    rule += f"; {kind} has no kernel for {text}, first at {name}"
    if kernels == "required":
        raise QSearchError(
            f'{rule}: use int or uint formats with -c and +a8, or kernels="preferred"'
        )
    cost = (
        "each call widens the weight and multiplies in floating point: no faster than full "
        "precision, up to twice its time at few rows"
    )
    warnings.warn(
        f"{rule}; {cost}. The numbers and the memory are the plan's.",
        DequantizeFallbackWarning,
        stacklevel=3,
    )


def _templates(
    model: nn.Module,
    graph: OpGraph,
    chosen: Mapping[str, Choices],
    splits: Mapping[str, Sequence[int]],
) -> list[tuple[str, QuantLayer, torch.device]]:
    """Every layer to be, on the meta device, so that what can't be done is said before anything is
    done.
    """
    made = []
    for name, choices in chosen.items():
        weight, axis = weight_of(model, name), graph.layer(name).channel_axis
        source = model.get_submodule(name)
        for scheme in dict.fromkeys(choices):
            layer = _empty(source, name, scheme, axis, splits[name], "meta")
            made.append((name, layer, weight.device))
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
            f"linear layers and convolutions of torch have a packed form; {name} is "
            f"{type(source).__name__}: keep it"
        )
    return layer


def _empty_choices(
    source: nn.Module,
    name: str,
    choices: Choices,
    axis: int,
    splits: Sequence[int],
    device: torch.device | str,
) -> QuantLayer | RangedLayer:
    """The packed layer for one choice, or for one in each range of steps."""
    if len(choices) == 1:
        return _empty(source, name, choices[0], axis, splits, device)
    owners: list[int] = []
    first: dict[Scheme, int] = {}
    for i, fit in enumerate(fits(choices)):
        apart = fit.stored is not None
        owners.append(i if apart else first.setdefault(fit.scheme.weight_only, i))
    return RangedLayer([_empty(source, name, s, axis, splits, device) for s in choices], owners)


def _fill(
    layer: QuantLayer,
    source: nn.Module,
    weights: QuantizedWeights,
    name: str,
    fit: Fit,
    *,
    own: bool,
) -> None:
    """Codes (of a layer with a weight of its own), scales, and what the input's transforms store,
    from what `simulate` would show.
    """
    assert isinstance(source, nn.Linear | Convolution)
    weight, bias, scheme = source.weight.data, source.bias, fit.scheme
    if scheme.format != "keep" and own:
        for i, quantized in enumerate(weights.codes(name, scheme, fit.stored)):
            layer.parts[i] = packed_weight(quantized)
    quantizer = weights.input_quantizer(name, scheme, fit.read)
    if quantizer is not None and layer.input is not None:
        made = layer.input.fill(quantizer, weight, bias)
        if made is not bias and made is not None:
            layer.bias = nn.Parameter(made, requires_grad=False)


def _share(model: nn.Module, alias: str, layer: QuantLayer | RangedLayer, graph: OpGraph) -> None:
    """Another module with the same weight gets the same packed parts, and keeps its own bias and
    its own untouched input.
    """
    source = model.get_submodule(alias)
    spec = next(x for x in graph if alias in x.aliases)
    if isinstance(layer, RangedLayer):
        raise QSearchError(
            f"{spec.name} and {alias} share one weight, and the plan changes it between "
            "ranges of steps; give it one choice"
        )
    other = _empty(source, alias, layer.scheme.weight_only, spec.channel_axis, layer.splits, "meta")
    if layer.scheme.scales_weight:
        raise QSearchError(
            f"{spec.name} and {alias} share one weight, and {layer.scheme} moves a scale "
            f"into it that {alias} does not take into account; use no transform"
        )
    other.parts = layer.parts
    replace_layer(model, source, other)


def _others(layer: LayerSpec) -> list[str]:
    """The names of other modules with the same weight."""
    return [alias for alias in layer.aliases if alias not in layer.shared]


def replace_layer(model: nn.Module, source: nn.Module, layer: nn.Module) -> None:
    """Put `layer` wherever `source` stands, with the hook by which accelerate sends it its
    inputs.
    """
    layer.train(source.training)
    if (hook := source.__dict__.get("_hf_hook")) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # every name of a module that has two
            if child is source:
                setattr(parent, name, layer)
