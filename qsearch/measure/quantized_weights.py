"""QuantizedWeights: the simulated weights and input quantizers of a model's layers, made once for
each scheme and range of steps.

What `simulate` exchanges, what probes contract and what packed layers store come from here, so that
all three are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..choices.input_quantizer import (
    InputQuantizer,
    fit_input_quantizer,
    needs_inputs,
    needs_moments,
)
from ..choices.quantization import Quantized, joined, method_of, quantize_parts
from ..choices.statistics import LayerInputs
from ..core.cost import Choices
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..core.sites import is_site
from ..core.steps import StepRanges
from .attentions import Drifts, fit_drifts
from .calibration import calibrate, has_rows
from .pipelines import Call
from .placement import offloaded
from .streaming import present


@dataclass(frozen=True)
class Fit:
    """A scheme and the calls on which it is fitted: of a range of steps, by its number, or all
    (None).

    `stored`: for what is stored of the weight. `read`: for what happens to the input.
    """

    scheme: Scheme
    stored: int | None = None
    read: int | None = None


def fits(choices: Choices) -> tuple[Fit, ...]:
    """How the choices of one site are fitted, one for each range of steps (or one for all).

    A weight that no transform scales is one weight, fitted on all calls; transforms and static
    ranges go by their own range.
    """
    if len(choices) == 1:
        return (Fit(choices[0]),)
    return tuple(
        Fit(s, i if s.scales_weight else None, i if s.fitted_by_range else None)
        for i, s in enumerate(choices)
    )


class QuantizedWeights:
    """The simulated weights of a model's layers, computed once for each (layer, scheme, range of
    steps) and kept.

    Args:
        model: the denoiser.
        graph: its graph.
        calibration: what goes into the layers, from `calibrate`; wanted by methods, static ranges
            and transforms that go by it.
        ranges: the same for each range of steps, where a plan has choices that are fitted by range.
        drifts: what calibration chose for attentions that are fitted (`attentions.fit_drifts`).

    `calibrated_weights` makes what given schemes need, `weights_for` what a plan needs.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: OpGraph,
        calibration: Mapping[str, LayerInputs] | None = None,
        ranges: Sequence[Mapping[str, LayerInputs]] = (),
        drifts: Drifts | None = None,
    ) -> None:
        self.drifts = drifts or {}
        self.model, self.graph = model, graph
        self.calibration, self.ranges = calibration or {}, tuple(ranges)
        self._weights: dict[tuple[str, str, int | None], Tensor] = {}
        self._input_quantizers: dict[tuple[str, str, int | None], InputQuantizer | None] = {}
        self._learnt: dict[tuple[str, str], tuple[Quantized, ...]] = {}

    def fresh(self) -> QuantizedWeights:
        """The same calibration, and nothing kept yet."""
        return QuantizedWeights(self.model, self.graph, self.calibration, self.ranges, self.drifts)

    def get(self, layer: str, scheme: Scheme, place: int | None = None) -> Tensor:
        """Weight of `layer` as `scheme` stores it, in the weight's own shape, dtype and device;
        itself where it is kept.

        `place`: the range of steps that it is fitted on; all calls when left out.
        """
        if scheme.format == "keep":
            with present(self.model.get_submodule(layer)):
                return weight_of(self.model, layer).data
        key = (layer, self._key(scheme), place)
        if key not in self._weights:
            with present(self.model.get_submodule(layer)):
                self._weights[key] = self._make(layer, scheme, place)
        return self._weights[key]

    def input_quantizer(
        self, layer: str, scheme: Scheme, place: int | None = None
    ) -> InputQuantizer | None:
        """What `scheme` does to the input of `layer`, fitted on range `place` of the steps; None
        where it does nothing.
        """
        key = (layer, str(scheme), place)
        if key not in self._input_quantizers:
            module, inputs = self.model.get_submodule(layer), self._inputs(layer, scheme, place)
            with present(module):
                weight = weight_of(self.model, layer).data
                made = fit_input_quantizer(scheme, weight, module, inputs, layer=layer)
            self._input_quantizers[key] = made
        return self._input_quantizers[key]

    def codes(self, layer: str, scheme: Scheme, place: int | None = None) -> tuple[Quantized, ...]:
        """What is stored of the layer's weight: a part for each part of its input, times the scale
        that the scheme's transforms move into it.
        """
        if (layer, str(scheme)) in self._learnt:
            return self._learnt[layer, str(scheme)]
        with present(self.model.get_submodule(layer)):
            weight = weight_of(self.model, layer).data
        spec = self.graph.layer(layer)
        inputs = self._inputs(layer, scheme, place)
        if (
            scheme.transforms
            and (input_quantizer := self.input_quantizer(layer, scheme, place)) is not None
        ):
            inputs, weight = input_quantizer.inputs, input_quantizer.weight(weight.float())
        module = self.model.get_submodule(layer)
        if method_of(scheme).needs_inputs and not has_rows(module):
            raise QSearchError(
                f"@{scheme.method} is for linear layers and convolutions in one group, "
                f"padded with zeros; {layer} is {type(module).__name__}"
            )
        return quantize_parts(
            weight,
            scheme,
            axis=spec.channel_axis,
            splits=spec.parts,
            layer=layer,
            moments=None if inputs is None else inputs.moments,
        )

    def forget(self, layer: str, *, input_quantizers: bool = True) -> None:
        """Free what is kept of a layer: its weights, and what happens to its input."""
        for kept in (
            (self._weights, self._input_quantizers) if input_quantizers else (self._weights,)
        ):
            for key in [key for key in kept if key[0] == layer]:
                del kept[key]

    def learn(
        self,
        layer: str,
        scheme: Scheme,
        parts: tuple[Quantized, ...] | None,
        input_quantizer: InputQuantizer | None,
    ) -> None:
        """Keep what reconstruction found for `layer` at `scheme`: codes, in place of what its
        method would make, and what happens to its input.
        """
        if parts is not None:
            self._learnt[layer, str(scheme)] = parts
        self._input_quantizers[layer, str(scheme), None] = input_quantizer
        self._weights.pop((layer, self._key(scheme), None), None)

    def _inputs(self, layer: str, scheme: Scheme, place: int | None) -> LayerInputs | None:
        if place is not None and not self.ranges:
            raise QSearchError(
                f"{scheme} at {layer} is fitted for each range of steps; give what "
                "`weights_for` makes of the plan and recorded calls"
            )
        found = (self.calibration if place is None else self.ranges[place]).get(layer)
        if found is None and (self.calibration or self.ranges) and needs_inputs(scheme):
            raise QSearchError(
                f"{scheme} needs to know the inputs of {layer}, which the calls for "
                "calibration do not run; give it a scheme without them"
            )
        return found

    def _make(self, layer: str, scheme: Scheme, place: int | None) -> Tensor:
        weight, parts = weight_of(self.model, layer), self.codes(layer, scheme, place)
        input_quantizer = self.input_quantizer(layer, scheme, place) if scheme.transforms else None
        return (
            joined(parts, weight.dtype)
            if input_quantizer is None
            else input_quantizer.restore_weight(joined(parts)).to(weight.dtype)
        )

    def _key(self, scheme: Scheme) -> str:
        """What weights are kept under: what happens to the input matters where it changes the
        weight, or was learnt together with it.
        """
        together = scheme.transforms or any(learnt == str(scheme) for _, learnt in self._learnt)
        return str(scheme if together else scheme.weight_only)


def calibrated_weights(
    model: nn.Module,
    graph: OpGraph,
    wanted: Mapping[str, Iterable[Scheme]],
    calls: Sequence[Call],
) -> QuantizedWeights:
    """`QuantizedWeights` that can carry out the schemes in `wanted` (layer -> schemes), calibrated
    on `calls` as far as those schemes ask for it.

    Raises `QSearchError` where a scheme asks for calibration and no call is given.
    """
    layers = {name: held for name, held in wanted.items() if not is_site(name)}
    drifts = fit_drifts(model, graph, wanted, calls)
    return QuantizedWeights(model, graph, _recorded(model, graph, layers, calls), drifts=drifts)


def weights_for(
    model: nn.Module, graph: OpGraph, plans: Iterable[Plan], calls: Sequence[Call]
) -> QuantizedWeights:
    """`QuantizedWeights` that can carry out several plans, whose ranges of steps are the same where
    they are fitted by range.

    Raises:
        QSearchError: a choice asks for calibration and no call is given, a range of steps has no
            call, or two plans cut the steps in two ways and both have choices that are fitted by
            range.
    """
    plans = list(plans)
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
            "plans whose choices are fitted for ranges of steps are calibrated together "
            "where they cut the steps alike; "
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
                    f"{len(steps)} ranges of steps need a recorded call each to be "
                    f"calibrated on; range {i} has none: "
                    "record more bins (calibrate.bins)"
                )
            ranges.append(_recorded(model, graph, apart, part, some=True) or {})
    attentions: dict[str, list[Scheme]] = {}
    for plan in plans:
        for site, choices in plan.sites.items():
            attentions.setdefault(site, []).extend(choices)
    drifts = fit_drifts(model, graph, attentions, calls)
    own = _recorded(model, graph, whole, calls)
    return QuantizedWeights(model, graph, own, _from_nearest(ranges), drifts)


def _from_nearest(ranges: Sequence[Mapping[str, LayerInputs]]) -> list[dict[str, LayerInputs]]:
    """Each range's inputs, those of a component that does not run in it from the nearest range in
    which it does.
    """
    filled: list[dict[str, LayerInputs]] = []
    for i in range(len(ranges)):
        mine: dict[str, LayerInputs] = {}
        for j in sorted(range(len(ranges)), key=lambda j: abs(j - i), reverse=True):
            mine |= ranges[j]
        filled.append(mine)
    return filled


def _recorded(
    model: nn.Module,
    graph: OpGraph,
    wanted: Mapping[str, Iterable[Scheme]],
    calls: Sequence[Call],
    *,
    some: bool = False,
) -> dict[str, LayerInputs] | None:
    asking = {layer: [s for s in held if needs_inputs(s)] for layer, held in wanted.items()}
    layers = [layer for layer, held in asking.items() if held]
    if not layers:
        return None
    moments = any(needs_moments(s) for held in asking.values() for s in held)
    return calibrate(model, graph, calls, layers, moments=moments, some=some)


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight parameter of a layer.

    Raises:
        QSearchError: the model has no such layer; its weight is not there between calls, or is cast
            for each.
    """
    try:
        weight = model.get_submodule(layer).weight
    except AttributeError:
        raise QSearchError(
            f"{type(model).__name__} has no layer {layer!r} with a weight; extract its graph again"
        ) from None
    assert isinstance(weight, nn.Parameter)
    if weight.is_meta:
        raise offloaded(layer)
    if weight.is_floating_point() and weight.element_size() == 1:
        raise QSearchError(
            f"the weight of {layer} is stored as "
            f"{str(weight.dtype).removeprefix('torch.')} and cast for each call: load the "
            "model "
            "without `enable_layerwise_casting`"
        )
    return weight
