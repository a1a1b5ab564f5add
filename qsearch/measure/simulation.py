"""simulate(model, plan): the model computes as if its weights were stored by the plan, in plain torch, undone on exit.

What profiling measures and what the runtime must reproduce. Weights are exchanged by pointer, so that entering and
leaving copies nothing; inputs are rounded in forward hooks. An exception on the way leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import Scheme
from ..core.sites import parted
from .attention import passing, rounding
from .calibration import LayerInputs, calibrate, has_rows
from .pipelines import Call
from .quantization import Quantized, joined, method_of, quantize_parts
from .stepranges import StepRanges, cut, time_of
from .treatment import Treatment, named, needs_inputs, treat


class QuantizedWeights:
    """The simulated weights of a model's layers, computed once for each (layer, scheme) and kept.

    `calibration`: what goes into the layers, from `calibrate`; wanted by methods, static ranges and transforms that go by it. `ranges`: number
    of ranges of steps -> the same for each of them, for schemes with `~steps`. `calibrated_weights` makes what given schemes need.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: OpGraph,
        calibration: Mapping[str, LayerInputs] | None = None,
        ranges: Mapping[int, StepRanges] | None = None,
    ) -> None:
        self.model, self.graph, self.calibration, self.ranges = (
            model,
            graph,
            calibration or {},
            ranges or {},
        )
        self._weights: dict[tuple[str, str, int], Tensor] = {}
        self._treatments: dict[tuple[str, str, int], Treatment | None] = {}
        self._learnt: dict[tuple[str, str], tuple[Quantized, ...]] = {}

    def fresh(self) -> QuantizedWeights:
        """The same calibration, and nothing kept yet."""
        return QuantizedWeights(self.model, self.graph, self.calibration, self.ranges)

    def get(self, layer: str, scheme: Scheme, part: int = 0) -> Tensor:
        """Weight of `layer` as `scheme` stores it (for range `part` of its steps), in the weight's own shape, dtype and device; itself where it is kept."""
        if scheme.format == "keep":
            return weight_of(self.model, layer).data
        key = (layer, self._key(scheme), part)
        if key not in self._weights:
            self._weights[key] = self._make(layer, scheme, part)
        return self._weights[key]

    def treatment(self, layer: str, scheme: Scheme, part: int = 0) -> Treatment | None:
        """What `scheme` does to the input of `layer` (in range `part` of its steps); None where it does nothing."""
        key = (layer, str(scheme), part)
        if key not in self._treatments:
            weight = weight_of(self.model, layer).data
            module, inputs = self.model.get_submodule(layer), self._inputs(layer, scheme, part)
            self._treatments[key] = treat(
                scheme, weight, module, inputs, layer=layer, transforms=named(scheme)
            )
        return self._treatments[key]

    def codes(self, layer: str, scheme: Scheme, part: int = 0) -> tuple[Quantized, ...]:
        """What is stored of the layer's weight: a part for each part of its input, times the scale that the scheme's transforms move into it."""
        if (layer, str(scheme)) in self._learnt:
            return self._learnt[layer, str(scheme)]
        weight, spec = weight_of(self.model, layer).data, self.graph.layer(layer)
        inputs, scale = self._inputs(layer, scheme, part), None
        if scheme.transforms and (treatment := self.treatment(layer, scheme, part)) is not None:
            inputs, scale = treatment.inputs, _columns(treatment, weight)
        module = self.model.get_submodule(layer)
        if method_of(scheme).needs_inputs and not has_rows(module):
            raise QSearchError(
                f"@{scheme.method} is for linear layers and 2d convolutions in one group, padded with zeros; {layer} is {type(module).__name__}"
            )
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

    def learn(
        self,
        layer: str,
        scheme: Scheme,
        parts: tuple[Quantized, ...] | None,
        treatment: Treatment | None,
    ) -> None:
        """Keep what somebody else found for `layer` at `scheme`: codes, in place of what its method would make, and what happens to its input."""
        if parts is not None:
            self._learnt[layer, str(scheme)] = parts
        self._treatments[layer, str(scheme), 0] = treatment
        self._weights.pop((layer, self._key(scheme), 0), None)

    def _inputs(self, layer: str, scheme: Scheme, part: int) -> LayerInputs | None:
        if scheme.ranges == 1:
            found = self.calibration.get(layer)
        elif scheme.ranges in self.ranges:
            found = self.ranges[scheme.ranges].parts[part].get(layer)
        else:
            raise QSearchError(
                f"{scheme} at {layer} goes by {scheme.ranges} ranges of steps; give what `calibrated_weights` makes of recorded calls"
            )
        if found is None and (self.calibration or self.ranges) and needs_inputs(scheme):
            raise QSearchError(
                f"{scheme} needs to know the inputs of {layer}, which the calls for calibration do not run; give it a scheme without them"
            )
        return found

    def _make(self, layer: str, scheme: Scheme, part: int) -> Tensor:
        weight, parts = weight_of(self.model, layer).data, self.codes(layer, scheme, part)
        treatment = self.treatment(layer, scheme, part) if scheme.transforms else None
        return (
            joined(parts, weight.dtype)
            if treatment is None
            else (joined(parts) / _columns(treatment, weight)).to(weight.dtype)
        )

    def _key(self, scheme: Scheme) -> str:
        """What weights are kept under: what happens to the input matters where it changes the weight, or was learnt together with it."""
        together = scheme.transforms or any(learnt == str(scheme) for _, learnt in self._learnt)
        return str(scheme if together else scheme.weight_only)


def _columns(treatment: Treatment, weight: Tensor) -> Tensor:
    """The scale of each input channel, in a shape that spreads over the weight."""
    return treatment.scale.view(1, -1, *[1] * (weight.ndim - 2))


def calibrated_weights(
    model: nn.Module, graph: OpGraph, wanted: Mapping[str, Iterable[Scheme]], calls: Sequence[Call]
) -> QuantizedWeights:
    """`QuantizedWeights` that can carry out the schemes in `wanted` (layer -> schemes), calibrated on `calls` as far as those schemes ask for it.

    Raises `QSearchError` where a scheme asks for calibration and no call is given.
    """
    asking = {layer: [s for s in schemes if needs_inputs(s)] for layer, schemes in wanted.items()}
    counts = sorted({s.ranges for schemes in asking.values() for s in schemes})

    def made(calls: Sequence[Call], count: int) -> dict[str, LayerInputs]:
        mine = {
            layer: [s for s in schemes if s.ranges == count] for layer, schemes in asking.items()
        }
        moments = any(
            s.format != "keep" and method_of(s).needs_inputs
            for schemes in mine.values()
            for s in schemes
        )
        return calibrate(
            model,
            graph,
            calls,
            [layer for layer, schemes in mine.items() if schemes],
            moments=moments,
        )

    ranges = {}
    for count in (n for n in counts if n > 1):
        parts = cut(model, calls, count)
        times = tuple(
            tuple(sorted({time_of(model, c.args, c.kwargs) for c in part})) for part in parts
        )
        ranges[count] = StepRanges(times, tuple(made(part, count) for part in parts))
    return QuantizedWeights(model, graph, made(calls, 1) if 1 in counts else None, ranges)


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight parameter of a layer. Raises `QSearchError` when the model has no such layer."""
    try:
        weight = model.get_submodule(layer).weight
    except AttributeError:
        raise QSearchError(
            f"{type(model).__name__} has no layer {layer!r} with a weight; extract its graph again"
        ) from None
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


@dataclass
class _Place:
    """A layer inside `simulate`: its weight, the simulated values and treatments by range of steps (one where there are no ranges), and the range of now."""

    module: nn.Module
    weight: nn.Parameter
    full: Tensor
    values: list[Tensor]
    treatments: list[Treatment | None]
    now: int = 0

    def go(self, part: int) -> None:
        """Put the values of one range in place."""
        if part != self.now:
            self.now, self.weight.data = part, self.values[part]

    @contextmanager
    def treated(self) -> Iterator[None]:
        """The module rounds its input, and adds what that leaves to its output, inside the block."""

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            treatment = self.treatments[self.now]
            assert treatment is not None
            if args:
                return (treatment.before(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return (), {**kwargs, name: treatment.before(kwargs[name])}

        def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            treatment = self.treatments[self.now]
            assert treatment is not None
            return treatment.after(y, module, self.full, self.values[self.now])

        handles = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _following(model: nn.Module, places: Sequence[_Place], ranges: StepRanges) -> Iterator[None]:
    """Every call of `model` uses the values of its own range of steps inside the block."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = ranges.place(time_of(model, args, kwargs))
        for place in places:
            place.go(part)

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def simulate(
    model: nn.Module,
    plan: BitPlan | Mapping[str, Scheme],
    graph: OpGraph,
    weights: QuantizedWeights | None = None,
) -> Iterator[nn.Module]:
    """`model` with every weight as the plan stores it and every input and site of attention rounded as it says, inside the block.

    `plan` may be sparse (layers it does not name are kept); `weights` shares quantized weights between calls, and holds the calibration that
    some schemes need. Everything is made before anything is exchanged, so that what a layer gets does not depend on the others.
    """
    if isinstance(plan, BitPlan) and plan.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {plan.graph}, {graph.model} is graph {graph.id}; make a plan for this model"
        )
    weights = weights or QuantizedWeights(model, graph)
    layers, sites = parted(
        graph, {**plan.layers, **plan.sites} if isinstance(plan, BitPlan) else plan
    )  # a name that means nothing is a mistake
    with ExitStack() as stack, torch.no_grad():
        places: dict[int, list[_Place]] = {}
        for layer, scheme in layers.items():
            if scheme.format != "keep" or scheme.activation:
                parts = range(scheme.ranges)
                values, treatments = (
                    [weights.get(layer, scheme, i) for i in parts],
                    [weights.treatment(layer, scheme, i) for i in parts],
                )
                weight = weight_of(model, layer)
                places.setdefault(scheme.ranges, []).append(
                    _Place(model.get_submodule(layer), weight, weight.data, values, treatments)
                )
        for count, held in places.items():
            for place in held:
                if place.treatments[0] is not None:
                    stack.enter_context(place.treated())
                stack.enter_context(exchanged(place.weight, place.values[0]))
            if count > 1:
                stack.enter_context(_following(model, held, weights.ranges[count]))
        stack.enter_context(
            passing(
                model,
                {site: rounding(scheme) for site, scheme in sites.items() if scheme.activation},
            )
        )
        yield model
