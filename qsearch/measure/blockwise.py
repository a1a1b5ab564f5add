"""A layer while its block is reconstructed: gates on its weight, a factor on the range of its
input, and hooks that round as far as is asked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..choices.codes import qparams_from_range, quantize_to_grid
from ..choices.fake_quantization import grain_plugin, lsq_fake_quantize
from ..choices.input_quantizer import bias_of, with_first
from ..choices.learnt_rounding import Gates, rounding_regularizer
from ..choices.quantization import Quantized, from_groups, learnt_method, to_groups
from ..choices.transform import Product
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from .quantized_weights import QuantizedWeights, weight_of

_NARROWEST = 0.05  # of the calibrated range: a factor below it has gone astray


class Layer:
    """One layer of the block in hand. `mode`: whether its input is left alone ("off"), rounded with
    gradients ("soft") or as it will be ("whole").
    """

    def __init__(
        self, model: nn.Module, graph: OpGraph, name: str, scheme: Scheme, weights: QuantizedWeights
    ) -> None:
        self.scheme, self.mode = scheme, "whole"
        self.module, self.full = model.get_submodule(name), weight_of(model, name).data
        method = learnt_method(scheme)
        self.quantizer = weights.input_quantizer(
            name, scheme if method is None else replace(scheme, method="")
        )
        if self.quantizer is not None:
            self.quantizer = replace(self.quantizer, scheme=scheme)
        self.start = self.quantizer
        self.axis, self.splits = graph.layer(name).channel_axis, graph.layer(name).parts
        self.gates: list[Gates] = []
        self._grids: list[tuple[Tensor, Tensor, tuple[int, ...]]] = []
        self.parts: tuple[Quantized, ...] | None = None
        if method is not None:
            own = self.full.float()
            own = own if self.quantizer is None else self.quantizer.weight(own)
            plain: list[Quantized] = []
            for part in own.split(list(self.splits), 1 - self.axis) if self.splits else (own,):
                groups = to_groups(part, scheme, self.axis)
                scale, zero = qparams_from_range(
                    groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), scheme
                )
                self.gates.append(method.gates(groups, scale, zero, scheme))
                self._grids.append((scale, zero, tuple(part.shape)))
                plain.append(
                    Quantized(
                        quantize_to_grid(groups, scale, zero, scheme),
                        scheme,
                        tuple(part.shape),
                        self.axis,
                    )
                )
            self.parts = self._plain_parts = tuple(plain)
            self.plain = self._laid_out([part.code.values() for part in plain])
        else:
            self.plain = weights.get(name, scheme)
        self.hardened = self.plain
        self.range_scale = (
            torch.ones((), device=self.full.device).requires_grad_()
            if scheme.static_input
            else None
        )

    @staticmethod
    def learns(scheme: Scheme) -> bool:
        """Whether there is anything to learn: the rounding, or the static range of the input."""
        return learnt_method(scheme) is not None or scheme.static_input

    def value(self, *, soft: bool, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """The weight, between grid points with gradients (`soft`) or as it is hardened; and the
        rounding regularizer.
        """
        if not (soft and self.gates):
            return self.hardened, self.full.new_zeros(())
        shares = [gates.shares() for gates in self.gates]
        made = self._laid_out([gates.soft(s) for gates, s in zip(self.gates, shares, strict=True)])
        return made, torch.stack([rounding_regularizer(s, progress) for s in shares]).sum()

    def harden(self) -> None:
        """Put gates and factor, as they are now, into the weight and the range."""
        if self.gates:
            grids = zip(self.gates, self._grids, strict=True)
            self.parts = tuple(
                Quantized(
                    quantize_to_grid(g.hard(), scale, zero, self.scheme),
                    self.scheme,
                    shape,
                    self.axis,
                )
                for g, (scale, zero, shape) in grids
            )
            self.hardened = self._laid_out([part.code.values() for part in self.parts])
        if (
            self.range_scale is not None
            and self.start is not None
            and self.start.inputs is not None
        ):
            factor, inputs = self.range_scale.detach().clamp(min=_NARROWEST), self.start.inputs
            self.quantizer = replace(
                self.start,
                inputs=replace(inputs, low=inputs.low * factor, high=inputs.high * factor),
            )

    def reset(self) -> None:
        """Nearest rounding and the calibrated range again."""
        self.hardened, self.quantizer = self.plain, self.start
        if self.gates:
            self.parts = self._plain_parts

    def store(self, weights: QuantizedWeights, name: str) -> None:
        """Keep what is settled, for `simulate` and for whoever stores it."""
        weights.learn(name, self.scheme, self.parts, self.quantizer)

    def hooks(self) -> list[RemovableHandle]:
        """Round the input of the module, and add to its output what that leaves, by `mode`; remove
        them afterwards.
        """
        if self.quantizer is None:
            return []

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return with_first(rounded, args, kwargs)

        def rounded(x: Tensor) -> Tensor:
            made = self._before(x)
            held[:] = [(x, made)]
            return made

        def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            assert self.quantizer is not None
            x, made = held.pop()
            weight: Any = module.weight  # the one in use now
            return self.quantizer.output(y, Product(self.full, weight, bias_of(module), x, made))

        held: list[tuple[Tensor, Tensor]] = []
        return [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        ]

    def _before(self, x: Tensor) -> Tensor:
        assert self.quantizer is not None and self.start is not None
        if self.mode == "off":
            return x
        return (self.quantizer if self.mode == "whole" else self.start).fake_quantize(
            x, self._soft if self.mode == "soft" else None
        )

    def _soft(self, x: Tensor) -> Tensor:
        """The transformed input, rounded with gradients."""
        assert self.start is not None
        low, high = grain_plugin(self.scheme).ranges(
            x.detach(), self.start.channel, self.start.inputs
        )
        return lsq_fake_quantize(x, low, high, self.scheme.activation, self.range_scale)

    def _laid_out(self, parts: list[Tensor]) -> Tensor:
        made = [
            from_groups(groups, shape, self.axis)
            for groups, (_, _, shape) in zip(parts, self._grids, strict=True)
        ]
        whole = made[0] if len(made) == 1 else torch.cat(made, 1 - self.axis)
        return whole if self.quantizer is None else self.quantizer.restore_weight(whole)
