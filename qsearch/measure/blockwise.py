"""A layer while its block is reconstructed: gates on its weight, a factor on the range of its input, and hooks that round as far as is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core import plugins
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from .codes import largest, nearest, spanning
from .quantization import Quantized, from_groups, to_groups
from .rounding import Gates, neighbours, undecided
from .simulation import QuantizedWeights, weight_of
from .treatment import AbstractActivation

_SCALED = {"adaround": False, "adaround_scaled": True}
_NARROWEST = 0.05  # of the calibrated range: a factor below it has gone astray


class Layer:
    """One layer of the block in hand. `mode`: whether its input is left alone ("off"), rounded with gradients ("soft") or as it will be ("whole")."""

    def __init__(
        self, model: nn.Module, graph: OpGraph, name: str, scheme: Scheme, weights: QuantizedWeights
    ) -> None:
        self.scheme, self.mode = scheme, "whole"
        self.module, self.full = model.get_submodule(name), weight_of(model, name).data
        self.treatment = weights.treatment(
            name, replace(scheme, method="") if self.gated(scheme) else scheme
        )
        if self.treatment is not None:
            self.treatment = replace(self.treatment, scheme=scheme)
        self.start = self.treatment
        self.scale = (
            None
            if self.treatment is None
            else self.treatment.scale.view(1, -1, *[1] * (self.full.ndim - 2))
        )
        self.axis, self.splits = graph.layer(name).channel_axis, graph.layer(name).parts
        self.gates: list[Gates] = []
        self._grids: list[tuple[Tensor, Tensor, tuple[int, ...]]] = []
        self.parts: tuple[Quantized, ...] | None = None
        if self.gated(scheme):
            own = self.full.float() if self.scale is None else self.full.float() * self.scale
            plain: list[Quantized] = []
            for part in own.split(list(self.splits), 1 - self.axis) if self.splits else (own,):
                groups = to_groups(part, scheme, self.axis)
                scale, zero = spanning(
                    groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), scheme
                )
                self.gates.append(
                    Gates(
                        groups,
                        *neighbours(groups, scale, zero, scheme),
                        scaled=_SCALED[scheme.method],
                    )
                )
                self._grids.append((scale, zero, tuple(part.shape)))
                plain.append(
                    Quantized(
                        nearest(groups, scale, zero, scheme), scheme, tuple(part.shape), self.axis
                    )
                )
            self.parts = self._plain_parts = tuple(plain)
            self.plain = self._laid_out([part.code.values() for part in plain])
        else:
            self.plain = weights.get(name, scheme)
        self.settled = self.plain
        self.stretch = (
            torch.ones((), device=self.full.device).requires_grad_()
            if self.static(scheme)
            else None
        )

    @staticmethod
    def gated(scheme: Scheme) -> bool:
        """Whether the scheme's rounding is learnt."""
        return scheme.method in _SCALED and scheme.family in ("int", "uint", "float")

    @staticmethod
    def static(scheme: Scheme) -> bool:
        """Whether the range of the input is a constant, which can be learnt."""
        return bool(scheme.activation) and bool(
            plugins.load("activations", scheme.grain).needs_inputs
        )

    @classmethod
    def learns(cls, scheme: Scheme) -> bool:
        """Whether there is anything to learn."""
        return cls.gated(scheme) or cls.static(scheme)

    def value(self, *, soft: bool, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """The weight, between grid points with gradients (`soft`) or as it is settled; and the penalty on gates that are undecided."""
        if not (soft and self.gates):
            return self.settled, self.full.new_zeros(())
        shares = [gates.shares() for gates in self.gates]
        made = self._laid_out([gates.soft(s) for gates, s in zip(self.gates, shares, strict=True)])
        return made, torch.stack([undecided(s, progress) for s in shares]).sum()

    def settle(self) -> None:
        """Put gates and factor, as they are now, into the weight and the range."""
        if self.gates:
            grids = zip(self.gates, self._grids, strict=True)
            self.parts = tuple(
                Quantized(
                    nearest(g.hard(), scale, zero, self.scheme), self.scheme, shape, self.axis
                )
                for g, (scale, zero, shape) in grids
            )
            self.settled = self._laid_out([part.code.values() for part in self.parts])
        if self.stretch is not None and self.start is not None and self.start.inputs is not None:
            factor, inputs = self.stretch.detach().clamp(min=_NARROWEST), self.start.inputs
            self.treatment = replace(
                self.start,
                inputs=replace(inputs, low=inputs.low * factor, high=inputs.high * factor),
            )

    def forget(self) -> None:
        """Nearest rounding and the calibrated range again."""
        self.settled, self.treatment = self.plain, self.start
        if self.gates:
            self.parts = self._plain_parts

    def store(self, weights: QuantizedWeights, name: str) -> None:
        """Keep what is settled, for `simulate` and for whoever stores it."""
        weights.learn(name, self.scheme, self.parts, self.treatment)

    def hooks(self) -> list[RemovableHandle]:
        """Round the input of the module, and add to its output what that leaves, by `mode`; remove them afterwards."""
        if self.treatment is None:
            return []

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self._before(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return (), {**kwargs, name: self._before(kwargs[name])}

        def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            assert self.treatment is not None
            return self.treatment.after(y, module, self.full, module.weight)  # type: ignore[arg-type]  # a tensor: the one in use now

        return [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        ]

    def _before(self, x: Tensor) -> Tensor:
        treatment = self.treatment
        assert treatment is not None
        if self.mode == "off" or not self.scheme.activation:
            return x
        if self.mode == "whole":
            return treatment.before(x)
        assert self.start is not None
        shape = [1] * x.ndim
        shape[treatment.channel] = -1
        shift, scale = treatment.shift.view(shape), treatment.scale.view(shape)
        inner = (x.float() - shift) / scale
        activation: AbstractActivation = plugins.load("activations", self.scheme.grain)
        low, high = activation.ranges(inner.detach(), treatment.channel, self.start.inputs)
        return (
            straight_through(inner, low, high, self.scheme.activation, self.stretch) * scale + shift
        ).to(x.dtype)

    def _laid_out(self, parts: list[Tensor]) -> Tensor:
        made = [
            from_groups(groups, shape, self.axis)
            for groups, (_, _, shape) in zip(parts, self._grids, strict=True)
        ]
        whole = made[0] if len(made) == 1 else torch.cat(made, 1 - self.axis)
        return whole if self.scale is None else whole / self.scale


def straight_through(
    x: Tensor, low: Tensor, high: Tensor, form: str, stretch: Tensor | None = None
) -> Tensor:
    """fp32 `x` on the grid of `form` from `low` to `high`, both times `stretch`; rounding counts as doing nothing for gradients, clipping as it is.

    The gradient of `stretch` is LSQ's: rounding error over the scale inside the range, its end outside.
    """
    scheme = Scheme(f"uint{form}" if form.isdigit() else form)
    scale, zero = spanning(low, high, scheme)
    if stretch is not None:
        scale = scale * stretch
    ends = (
        (-zero, 2**scheme.bits - 1 - zero)
        if scheme.family == "uint"
        else (-largest(scheme), largest(scheme))
    )
    inside = (x / scale).clamp(*(torch.as_tensor(end, device=x.device) for end in ends))
    on_grid = nearest(x.detach(), scale.detach(), zero, scheme).values() / scale.detach()
    return scale * (inside + (on_grid - inside).detach())
