"""simulate(model, plan): the model computes as if its weights were stored by the plan, in plain
torch, undone on exit.

What profiling measures and what the runtime must reproduce. Weights are exchanged by pointer, so
that entering and leaving copies nothing; those of a streamed model are quantized when they come,
and let go with their unit. Inputs are rounded in forward hooks, straight through for gradients. A
plan over ranges of steps is followed by one hook on the denoiser, which goes by its clock. An
exception on the way leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..choices.fake_quantization import site_rounding, straight_through
from ..choices.input_quantizer import (
    InputQuantizer,
    hook_input,
)
from ..core.cost import Choices
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import ONE_RANGE, Plan
from ..core.plan_choices import checked
from ..core.scheme import Scheme
from ..core.sites import is_site
from ..core.steps import StepClock, StepRanges, clock_of
from . import quantized_weights
from .attention import passing
from .attentions import carries, planned_attentions
from .calls import measuring
from .quantized_weights import Fit, QuantizedWeights, fits, weight_of
from .sparse import sparse_attention
from .streaming import Stream, stream_of
from .units import Place


def __getattr__(name: str) -> Any:
    if name in ("calibrated_weights", "weights_for"):
        warnings.warn(
            f"{name} is in qsearch.measure.quantized_weights since 0.2.0",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(quantized_weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class _Place:
    """A layer inside `simulate`: its weight, and what it holds by range of steps (one where there
    are no ranges).

    `make`: range -> the simulated weight. `full`: the weight as it is, while it is there.
    """

    module: nn.Module
    weight: nn.Parameter
    make: Callable[[int], Tensor]
    input_quantizers: list[InputQuantizer | None]
    full: Tensor | None = None
    now: int = 0
    called: bool = False

    def enter(self) -> None:
        """Exchange the weight, which is there, for the simulated one."""
        self.full = self.weight.data
        self.weight.data = self.make(self.now)

    def leave(self) -> None:
        """Exchange it back."""
        assert self.full is not None
        self.weight.data, self.full = self.full, None

    def go(self, place: int) -> None:
        """Put the values of one range in place, now or when the weight comes."""
        if len(self.input_quantizers) > 1 and place != self.now:
            self.now = place
            if self.full is not None:
                self.weight.data = self.make(place)

    @contextmanager
    def rounding_input(self) -> Iterator[None]:
        """The module rounds its input, and adds what that leaves to its output, inside the
        block.
        """

        def now() -> tuple[InputQuantizer | None, Tensor, Tensor]:
            self.called = True
            assert self.full is not None, "the layer is called while its weight is there"
            return self.input_quantizers[self.now], self.full, self.weight.data

        handles = hook_input(self.module, now)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Streamed:
    """Exchanges weights of a streamed model as they come and go."""

    def __init__(self, places: Mapping[nn.Parameter, _Place]) -> None:
        self.places = {id(weight): place for weight, place in places.items()}

    def came(self, place: Place) -> None:
        """Quantize a weight that came, where the plan does."""
        if (found := self.places.get(id(place.parameter))) is not None:
            found.enter()

    def goes(self, place: Place) -> None:
        """Put back the weight that goes."""
        if (found := self.places.get(id(place.parameter))) is not None:
            found.leave()


def roots(model: nn.Module, graph: OpGraph) -> list[nn.Module]:
    """The modules that a pipeline calls: the components of the graph, or the model itself."""
    return [model.get_submodule(name) for name in graph.components] or [model]


@contextmanager
def _listening(model: nn.Module, graph: OpGraph, places: Mapping[str, _Place]) -> Iterator[None]:
    """Refuse, at the end of the block, where a component ran and a layer whose input is rounded was
    not called.

    A layer that the graph says is called must be: else the plan would not be carried out, and
    nobody would notice.
    """
    ran: set[nn.Module] = set()

    def after(root: nn.Module, args: Any, output: Any) -> None:
        ran.add(root)

    handles = [root.register_forward_hook(after) for root in roots(model, graph)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    waiting = [
        name
        for name, place in places.items()
        if any(t is not None for t in place.input_quantizers) and not place.called
    ]
    if ran and waiting:
        owner = dict(zip(graph.components or ("",), roots(model, graph), strict=True))
        called = [
            name
            for name in waiting
            if graph.layer(name).macs and owner[graph.component(name)] in ran
        ]
        if called:
            raise QSearchError(
                f"the plan rounds the input of {called[0]}, and the model ran without "
                "calling it through its module: is its "
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


@contextmanager
def _stepping(model: nn.Module, graph: OpGraph) -> Iterator[None]:
    """Every call of the model knows its sampler step inside the block, or is refused."""

    def before(root: nn.Module, args: Any) -> None:
        clock_of(root).step_in_call(root)

    handles = [root.register_forward_pre_hook(before) for root in roots(model, graph)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_range(clock: StepClock, steps: StepRanges, choices: Choices) -> Callable[[Tensor], Tensor]:
    """What the choices of one tensor of an attention do, in each call those of its own range of
    steps.
    """
    through = [site_rounding(scheme) if scheme.activation else None for scheme in choices]

    def changed(x: Tensor) -> Tensor:
        own = through[clock.range_of(steps) if len(through) > 1 else 0]
        return x if own is None else straight_through(x, own)

    return changed


def _everywhere(
    graph: OpGraph, schemes: Mapping[str, Scheme], ranges: StepRanges
) -> dict[str, Choices]:
    """The same scheme in each range; attentions begin anew where there are several choices."""
    held = checked(graph, schemes, ONE_RANGE)
    return {name: own * len(ranges) if is_site(name) else own for name, own in held.items()}


@contextmanager
def simulate(
    model: nn.Module,
    plan: Plan | Mapping[str, Scheme],
    graph: OpGraph,
    weights: QuantizedWeights | None = None,
    ranges: StepRanges = ONE_RANGE,
) -> Iterator[nn.Module]:
    """`model` with every weight as the plan stores it, every input and tensor of attention rounded
    and every attention computed as it says, inside the block.

    Gradients flow as before, straight through what is rounded.

    Args:
        model: the denoiser (or the container of several components, as `model_of` makes it for
            `graph.components`).
        plan: a plan, or site -> scheme for some of the sites (the others are kept).
        graph: the model's graph.
        weights: shares quantized weights between calls, and holds the calibration that some schemes
            need. Everything is made before anything is exchanged, so that what a layer gets does
            not depend on the others.
        ranges: of steps, in each of which what attentions carry begins anew; those of a plan are
            its own.

    Yields:
        The model, the same object.

    Raises:
        QSearchError: a plan of another graph, an unknown site, calibration that is wanted and
            missing.
    """
    if isinstance(plan, Plan) and plan.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {plan.graph}, {graph.model} is graph "
            f"{graph.id}; make a plan for this model"
        )
    weights = weights or QuantizedWeights(model, graph)
    steps = plan.steps if isinstance(plan, Plan) else ranges
    held = plan.choices if isinstance(plan, Plan) else _everywhere(graph, plan, ranges)
    places: dict[str, _Place] = {}
    streamed: dict[Stream, dict[nn.Parameter, _Place]] = {}
    with torch.no_grad():
        for layer, choices in held.items():
            if is_site(layer) or all(s.format == "keep" and not s.activation for s in choices):
                continue
            fitted, weight = fits(choices), weight_of(model, layer)
            known = stream_of(weight)
            make = _maker(weights, layer, fitted, forget=known is not None)
            input_quantizers = [
                weights.input_quantizer(layer, fit.scheme, fit.read) for fit in fitted
            ]
            places[layer] = _Place(model.get_submodule(layer), weight, make, input_quantizers)
            if known is not None:
                streamed.setdefault(known[0], {})[weight] = places[layer]
    clock = clock_of(roots(model, graph)[0])
    attentions = planned_attentions(graph, held, steps, clock, weights.drifts)
    sites = {
        site: _by_range(clock, steps, choices)
        for site, choices in held.items()
        if is_site(site) and any(s.activation for s in choices)
    }
    with ExitStack() as stack:
        stack.enter_context(measuring(*roots(model, graph)))
        stack.enter_context(_listening(model, graph, places))
        for place in places.values():
            if any(input_quantizer is not None for input_quantizer in place.input_quantizers):
                stack.enter_context(place.rounding_input())
            known = stream_of(place.weight)
            if known is None or known[1].loaded:
                place.enter()
                stack.callback(place.leave)
        for stream, own in streamed.items():
            stack.enter_context(stream.watched(_Streamed(own)))
        if len(steps) > 1:
            stack.enter_context(_following(model, graph, steps, list(places.values())))
        stack.enter_context(passing(model, sites))
        if attentions:
            if carries(held):
                stack.enter_context(_stepping(model, graph))
            stack.enter_context(sparse_attention(model, attentions, lambda: clock.step))
        yield model


def _maker(
    weights: QuantizedWeights, layer: str, fitted: Sequence[Fit], *, forget: bool
) -> Callable[[int], Tensor]:
    """Range -> the simulated weight: made now and kept, or made when it is asked for and not kept
    (`forget`).
    """
    if not forget:
        made = [weights.get(layer, fit.scheme, fit.stored) for fit in fitted]
        return made.__getitem__

    def make(place: int) -> Tensor:
        value = weights.get(layer, fitted[place].scheme, fitted[place].stored)
        weights.forget(layer, input_quantizers=False)
        return value

    return make
