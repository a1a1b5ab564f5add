"""simulate(model, plan): the model computes as if its weights were stored by the plan, in plain torch, undone on exit.

What profiling measures and what the runtime must reproduce. Weights are exchanged by pointer, so that entering and
leaving copies nothing; inputs are rounded in forward hooks, straight through for gradients. A plan over ranges of steps is
followed by one hook on the denoiser, which goes by its clock. An exception on the way leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..choices.fake_quantization import site_rounding, straight_through
from ..choices.input_quantizer import (
    InputQuantizer,
    fit_input_quantizer,
    hook_input,
    needs_inputs,
    needs_moments,
)
from ..choices.quantization import Quantized, joined, method_of, quantize_parts
from ..choices.statistics import LayerInputs
from ..core.cost import Choices
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import ONE_RANGE, Plan, checked
from ..core.scheme import Scheme
from ..core.sites import is_site
from ..core.steps import StepClock, StepRanges, clock_of
from .attention import passing
from .calibration import calibrate, has_rows
from .pipelines import Call


@dataclass(frozen=True)
class Fit:
    """A scheme and the calls on which it is fitted: of a range of steps, by its number, or all (None).

    `stored`: for what is stored of the weight. `read`: for what happens to the input.
    """

    scheme: Scheme
    stored: int | None = None
    read: int | None = None


def fits(choices: Choices) -> tuple[Fit, ...]:
    """How the choices of one site are fitted, one for each range of steps (or one for all).

    A weight that no transform scales is one weight, fitted on all calls; transforms and static ranges go by their own range.
    """
    if len(choices) == 1:
        return (Fit(choices[0]),)
    return tuple(
        Fit(s, i if s.scales_weight else None, i if s.fitted_by_range else None)
        for i, s in enumerate(choices)
    )


class QuantizedWeights:
    """The simulated weights of a model's layers, computed once for each (layer, scheme, range of steps) and kept.

    Args:
        model: the denoiser.
        graph: its graph.
        calibration: what goes into the layers, from `calibrate`; wanted by methods, static ranges and transforms that go by it.
        ranges: the same for each range of steps, where a plan has choices that are fitted by range.

    `calibrated_weights` makes what given schemes need, `weights_for` what a plan needs.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: OpGraph,
        calibration: Mapping[str, LayerInputs] | None = None,
        ranges: Sequence[Mapping[str, LayerInputs]] = (),
    ) -> None:
        self.model, self.graph = model, graph
        self.calibration, self.ranges = calibration or {}, tuple(ranges)
        self._weights: dict[tuple[str, str, int | None], Tensor] = {}
        self._treatments: dict[tuple[str, str, int | None], InputQuantizer | None] = {}
        self._learnt: dict[tuple[str, str], tuple[Quantized, ...]] = {}

    def fresh(self) -> QuantizedWeights:
        """The same calibration, and nothing kept yet."""
        return QuantizedWeights(self.model, self.graph, self.calibration, self.ranges)

    def get(self, layer: str, scheme: Scheme, place: int | None = None) -> Tensor:
        """Weight of `layer` as `scheme` stores it, in the weight's own shape, dtype and device; itself where it is kept.

        `place`: the range of steps that it is fitted on; all calls when left out.
        """
        if scheme.format == "keep":
            return weight_of(self.model, layer).data
        key = (layer, self._key(scheme), place)
        if key not in self._weights:
            self._weights[key] = self._make(layer, scheme, place)
        return self._weights[key]

    def treatment(
        self, layer: str, scheme: Scheme, place: int | None = None
    ) -> InputQuantizer | None:
        """What `scheme` does to the input of `layer`, fitted on range `place` of the steps; None where it does nothing."""
        key = (layer, str(scheme), place)
        if key not in self._treatments:
            weight = weight_of(self.model, layer).data
            module, inputs = (
                self.model.get_submodule(layer),
                self._inputs(layer, scheme, place),
            )
            self._treatments[key] = fit_input_quantizer(scheme, weight, module, inputs, layer=layer)
        return self._treatments[key]

    def codes(self, layer: str, scheme: Scheme, place: int | None = None) -> tuple[Quantized, ...]:
        """What is stored of the layer's weight: a part for each part of its input, times the scale that the scheme's transforms move into it."""
        if (layer, str(scheme)) in self._learnt:
            return self._learnt[layer, str(scheme)]
        weight, spec = weight_of(self.model, layer).data, self.graph.layer(layer)
        inputs = self._inputs(layer, scheme, place)
        if scheme.transforms and (treatment := self.treatment(layer, scheme, place)) is not None:
            inputs, weight = treatment.inputs, treatment.weight(weight.float())
        module = self.model.get_submodule(layer)
        if method_of(scheme).needs_inputs and not has_rows(module):
            raise QSearchError(
                f"@{scheme.method} is for linear layers and 2d convolutions in one group, padded with zeros; {layer} is {type(module).__name__}"
            )
        return quantize_parts(
            weight,
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
        treatment: InputQuantizer | None,
    ) -> None:
        """Keep what somebody else found for `layer` at `scheme`: codes, in place of what its method would make, and what happens to its input."""
        if parts is not None:
            self._learnt[layer, str(scheme)] = parts
        self._treatments[layer, str(scheme), None] = treatment
        self._weights.pop((layer, self._key(scheme), None), None)

    def _inputs(self, layer: str, scheme: Scheme, place: int | None) -> LayerInputs | None:
        if place is not None and not self.ranges:
            raise QSearchError(
                f"{scheme} at {layer} is fitted for each range of steps; give what `weights_for` makes of the plan and recorded calls"
            )
        found = (self.calibration if place is None else self.ranges[place]).get(layer)
        if found is None and (self.calibration or self.ranges) and needs_inputs(scheme):
            raise QSearchError(
                f"{scheme} needs to know the inputs of {layer}, which the calls for calibration do not run; give it a scheme without them"
            )
        return found

    def _make(self, layer: str, scheme: Scheme, place: int | None) -> Tensor:
        weight, parts = weight_of(self.model, layer).data, self.codes(layer, scheme, place)
        treatment = self.treatment(layer, scheme, place) if scheme.transforms else None
        return (
            joined(parts, weight.dtype)
            if treatment is None
            else treatment.restore_weight(joined(parts)).to(weight.dtype)
        )

    def _key(self, scheme: Scheme) -> str:
        """What weights are kept under: what happens to the input matters where it changes the weight, or was learnt together with it."""
        together = scheme.transforms or any(learnt == str(scheme) for _, learnt in self._learnt)
        return str(scheme if together else scheme.weight_only)


def calibrated_weights(
    model: nn.Module,
    graph: OpGraph,
    wanted: Mapping[str, Iterable[Scheme]],
    calls: Sequence[Call],
) -> QuantizedWeights:
    """`QuantizedWeights` that can carry out the schemes in `wanted` (layer -> schemes), calibrated on `calls` as far as those schemes ask for it.

    Raises `QSearchError` where a scheme asks for calibration and no call is given.
    """
    return QuantizedWeights(model, graph, _recorded(model, graph, wanted, calls))


def weights_for(
    model: nn.Module, graph: OpGraph, plans: Iterable[Plan], calls: Sequence[Call]
) -> QuantizedWeights:
    """`QuantizedWeights` that can carry out several plans, whose ranges of steps are the same where they are fitted by range.

    Raises:
        QSearchError: a choice asks for calibration and no call is given, a range of steps has no call, or two plans cut the steps in
            two ways and both have choices that are fitted by range.
    """
    whole: dict[str, list[Scheme]] = {}
    apart: dict[str, list[Scheme]] = {}
    cuts: set[StepRanges] = set()
    for plan in plans:
        for layer, choices in plan.weights.items():
            for fit in fits(choices):
                if fit.stored is None or fit.read is None:
                    whole.setdefault(layer, []).append(fit.scheme)
                if fit.read is not None:
                    apart.setdefault(layer, []).append(fit.scheme)
                    cuts.add(plan.steps)
    if len(cuts) > 1:
        raise QSearchError(
            "plans whose choices are fitted for ranges of steps are calibrated together where they cut the steps alike; "
            f"these cut them in {len(cuts)} ways"
        )
    ranges = []
    if cuts:
        steps = cuts.pop()
        parts: list[list[Call]] = [[] for _ in range(len(steps))]
        for call in calls:
            parts[steps.of(call.step, call.steps)].append(call)
        for i, part in enumerate(parts):
            if not part:
                raise QSearchError(
                    f"{len(steps)} ranges of steps need a recorded call each to be calibrated on; range {i} has none: "
                    "record more bins (calibrate.bins)"
                )
            ranges.append(_recorded(model, graph, apart, part) or {})
    return QuantizedWeights(model, graph, _recorded(model, graph, whole, calls), ranges)


def _recorded(
    model: nn.Module,
    graph: OpGraph,
    wanted: Mapping[str, Iterable[Scheme]],
    calls: Sequence[Call],
) -> dict[str, LayerInputs] | None:
    asking = {layer: [s for s in held if needs_inputs(s)] for layer, held in wanted.items()}
    layers = [layer for layer, held in asking.items() if held]
    if not layers:
        return None
    moments = any(needs_moments(s) for held in asking.values() for s in held)
    return calibrate(model, graph, calls, layers, moments=moments)


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
    """A layer inside `simulate`: its weight, and the simulated values and treatments by range of steps (one where there are no ranges)."""

    module: nn.Module
    weight: nn.Parameter
    full: Tensor
    values: list[Tensor]
    treatments: list[InputQuantizer | None]
    now: int = 0
    heard: bool = False

    def go(self, place: int) -> None:
        """Put the values of one range in place."""
        if len(self.values) > 1 and place != self.now:
            self.now, self.weight.data = place, self.values[place]

    @contextmanager
    def treated(self) -> Iterator[None]:
        """The module rounds its input, and adds what that leaves to its output, inside the block."""

        def now() -> tuple[InputQuantizer | None, Tensor, Tensor]:
            self.heard = True
            return self.treatments[self.now], self.full, self.values[self.now]

        handles = hook_input(self.module, now)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def roots(model: nn.Module, graph: OpGraph) -> list[nn.Module]:
    """The modules that a pipeline calls: the components of the graph, or the model itself."""
    return [model.get_submodule(name) for name in graph.components] or [model]


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled models and blocks run as they are written: hooks that came after their compilation would not be heard."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _listening(model: nn.Module, graph: OpGraph, places: Mapping[str, _Place]) -> Iterator[None]:
    """Refuse, at the end of the block, where the model ran and a layer whose input is rounded was not heard.

    A layer that the graph says is called must be: else the plan would not be carried out, and nobody would notice.
    """
    calls = 0

    def after(root: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [root.register_forward_hook(after) for root in roots(model, graph)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    waiting = [
        name
        for name, place in places.items()
        if any(t is not None for t in place.treatments) and not place.heard
    ]
    if calls >= len(handles) and waiting and len(graph.components) < 2:
        called = [name for name in waiting if graph.layer(name).macs]
        if called:
            raise QSearchError(
                f"the plan rounds the input of {called[0]}, and the model ran without calling it through its module: is its "
                "weight read by another function, or was the graph made for another call?"
            )


@contextmanager
def _following(
    model: nn.Module, graph: OpGraph, steps: StepRanges, places: Sequence[_Place]
) -> Iterator[None]:
    """Every call of the model uses the values of its own range of steps inside the block."""

    def before(root: nn.Module, args: Any) -> None:
        place = clock_of(root).range_in_call(root, steps)
        for one in places:
            one.go(place)

    handles = [root.register_forward_pre_hook(before) for root in roots(model, graph)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_range(clock: StepClock, steps: StepRanges, choices: Choices) -> Callable[[Tensor], Tensor]:
    """What the choices of one tensor of an attention do, in each call those of its own range of steps."""
    through = [site_rounding(scheme) if scheme.activation else None for scheme in choices]

    def changed(x: Tensor) -> Tensor:
        own = through[clock.range_of(steps) if len(through) > 1 else 0]
        return x if own is None else straight_through(x, own)

    return changed


@contextmanager
def simulate(
    model: nn.Module,
    plan: Plan | Mapping[str, Scheme],
    graph: OpGraph,
    weights: QuantizedWeights | None = None,
) -> Iterator[nn.Module]:
    """`model` with every weight as the plan stores it and every input and tensor of attention rounded as it says, inside the block.

    Gradients flow as before, straight through what is rounded.

    Args:
        model: the denoiser (or the container of a pipeline's denoisers).
        plan: a plan, or site -> scheme for some of the sites (the others are kept).
        graph: the model's graph.
        weights: shares quantized weights between calls, and holds the calibration that some schemes need. Everything is made
            before anything is exchanged, so that what a layer gets does not depend on the others.

    Raises:
        QSearchError: a plan of another graph, an unknown site, calibration that is wanted and missing.
    """
    if isinstance(plan, Plan) and plan.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {plan.graph}, {graph.model} is graph {graph.id}; make a plan for this model"
        )
    weights = weights or QuantizedWeights(model, graph)
    steps = plan.steps if isinstance(plan, Plan) else ONE_RANGE
    held = plan.choices if isinstance(plan, Plan) else checked(graph, plan, steps)
    places: dict[str, _Place] = {}
    with torch.no_grad():
        for layer, choices in held.items():
            if is_site(layer) or all(s.format == "keep" and not s.activation for s in choices):
                continue
            fitted = fits(choices)
            values = [weights.get(layer, fit.scheme, fit.stored) for fit in fitted]
            treatments = [weights.treatment(layer, fit.scheme, fit.read) for fit in fitted]
            weight = weight_of(model, layer)
            module = model.get_submodule(layer)
            places[layer] = _Place(module, weight, weight.data, values, treatments)
    clock = clock_of(roots(model, graph)[0])
    sites = {
        site: _by_range(clock, steps, choices)
        for site, choices in held.items()
        if is_site(site) and any(s.activation for s in choices)
    }
    with ExitStack() as stack:
        stack.enter_context(eager())
        stack.enter_context(_listening(model, graph, places))
        for place in places.values():
            if any(treatment is not None for treatment in place.treatments):
                stack.enter_context(place.treated())
            stack.enter_context(exchanged(place.weight, place.values[0]))
        if len(steps) > 1:
            stack.enter_context(_following(model, graph, steps, list(places.values())))
        stack.enter_context(passing(model, sites))
        yield model
