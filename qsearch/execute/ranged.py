"""A packed layer that differs between ranges of sampler steps, and the hook that follows the
sampler.

Each range has a packed layer of its own; ranges with the same weight share it, so that memory holds
every stored copy once. The hook on the denoiser asks its clock at every call and changes layers
where one range ends and the next begins: layers themselves decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.cost import Choices
from ..core.steps import StepRanges, clock_of
from ..core.words import transform_word
from .layers import QuantConv2d, QuantConvolution, QuantLayer, QuantLinear


class RangedLayer(nn.Module):
    """A packed layer for each range of steps; `now` is the range whose layer computes.

    Args:
        layers: one for each range.
        owners: for each range, the range whose weight it shares (its own number where it has a
            weight of its own).
    """

    def __init__(self, layers: Sequence[QuantLayer], owners: Sequence[int]) -> None:
        super().__init__()
        self.ranges = nn.ModuleList(layers)
        self.owners, self.now = tuple(owners), 0
        self.share()

    @property
    def layers(self) -> list[QuantLayer]:
        """The packed layers, one for each range."""
        return [cast(QuantLayer, layer) for layer in self.ranges]

    @property
    def choices(self) -> Choices:
        """The scheme of each range."""
        return tuple(layer.scheme for layer in self.layers)

    def share(self) -> None:
        """Let layers that share a weight or a bias hold that of its owner, outside of their own
        state dicts.
        """
        layers = self.layers
        plain = [
            layer
            for layer in layers
            if not any(transform_word(word).adds_bias for word in layer.scheme.transforms)
        ]
        for i, layer in enumerate(layers):
            if self.owners[i] != i:
                layer._modules.pop("parts", None)
                layer.__dict__["parts"] = layers[self.owners[i]].parts
        for layer in plain[1:]:
            layer._parameters.pop("bias", None)
            layer.__dict__["bias"] = plain[0].bias

    def go(self, place: int) -> None:
        """Compute as range number `place` does from now on."""
        self.share()
        self.now = place

    def forward(self, x: Tensor) -> Tensor:
        """As the packed layer of the range of now."""
        made: Tensor = self.ranges[self.now](x)
        return made

    @property
    def weight(self) -> Tensor:
        """The weight that the layer of now stands for, in the type of its bias."""
        return self.layers[self.now].weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the layer of now."""
        return self.layers[self.now].bias


class StepSwitch:
    """A hook on a denoiser: before each call, its layers go to the range that the call's sampler
    step lies in.
    """

    def __init__(self, steps: StepRanges, layers: Iterable[RangedLayer]) -> None:
        self.steps, self.layers, self.now = steps, list(layers), -1

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the sampler's step is found outside of what is compiled
    def __call__(self, root: nn.Module, args: Any) -> None:
        """Before a call of `root`."""
        place = clock_of(root).range_in_call(root, self.steps)
        if place != self.now:
            for layer in self.layers:
                layer.go(place)
            self.now = place


def layers_in(model: nn.Module) -> dict[str, QuantLayer | RangedLayer]:
    """Name -> packed layer that stands in the place of a layer of the model, in the model's
    order.
    """
    found: dict[str, QuantLayer | RangedLayer] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, RangedLayer):
            inside |= {id(layer) for layer in module.layers}
            found[name] = module
        elif isinstance(module, QuantLinear | QuantConv2d | QuantConvolution):
            if id(module) not in inside:
                found[name] = module
    return found


def choices_of(layer: QuantLayer | RangedLayer) -> Choices:
    """The scheme of a packed layer, or one for each range of steps."""
    return layer.choices if isinstance(layer, RangedLayer) else (layer.scheme,)


def steps_in(model: nn.Module) -> StepRanges:
    """The ranges of steps that the packed layers of a model follow; one where none does."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, StepSwitch):
                return hook.steps
    return StepRanges()


def follow_steps(model: nn.Module, roots: Iterable[nn.Module], steps: StepRanges) -> None:
    """Let every packed layer of `model` follow the sampler from now on; nothing where no layer
    differs between ranges.
    """
    layers = [module for module in model.modules() if isinstance(module, RangedLayer)]
    if layers:
        switch = StepSwitch(steps, layers)
        for root in roots:
            root.register_forward_pre_hook(switch)
