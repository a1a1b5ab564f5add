"""Prices of choices for a whole attention: what each does to the output, with statistics as stale
as they will be, meets the gradient.

A trajectory is run twice: forwards without gradients, where queries, keys and values of dense steps
are kept, and step by step backwards, where each step is computed again. There the output's gradient
is contracted with (choice's output - dense output), the choice's statistics being those of the last
dense step before. Dense steps are the first of a sampling and of each range of steps that plans
will have, and every n-th after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..choices.attention import attention_plugin
from ..core.attention_words import attention_word
from ..core.attentions import AttentionSpec
from ..core.scheme import Scheme
from ..core.steps import StepClock, StepRanges
from .attentions import Drifts, with_heads

Projections = tuple[Tensor, Tensor, Tensor]
#: (rows of the choices, their shares)
Add = Callable[[Sequence[list[int]], Tensor], None]
#: (what attention made, what is done with it and its gradient) -> what goes on
Watch = Callable[[Tensor, Callable[[Tensor, Tensor], None]], Tensor]


class PricedAttention:
    """What goes on at one `MODULE:attention` while choices are priced.

    Args:
        spec: the attention.
        ways: choice -> its rows.
        clock: of the denoiser.
        ranges: of steps, in each of which a choice begins with a dense step.
        drifts: what calibration chose.
        watch: sees to it that the gradient of an output is met.
        add: takes the shares of choices.
        squared: contract squares.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        variants: dict[Scheme, list[int]],
        clock: StepClock,
        ranges: StepRanges,
        drifts: Drifts,
        watch: Watch,
        add: Add,
        *,
        squared: bool = False,
    ) -> None:
        self.spec, self.variants, self.clock, self.drifts = spec, variants, clock, drifts
        self.ranges = ranges
        self.watch, self.add, self.squared = watch, add, squared
        self._every = {s: attention_word(s.attention).every(s.attention) for s in variants}
        self._kept: dict[int, list[Projections]] = {}  # dense step -> of each call
        self._calls: dict[int, int] = {}  # step -> how many calls it has
        self._turn: dict[int, int] = {}
        self._first, self._last, self._sampling, self._total = 0, -1, -1, 0
        self._begun: dict[tuple[Scheme, int, int], Any] = {}

    def __call__(self, made: Tensor, given: Projections, scale: float | None) -> Tensor:
        """Keep what a dense step's statistics are made of, or wait for the gradient."""
        if not torch.is_grad_enabled():
            self._keep(given)
            return made
        step, call = self.clock.step, 0
        if count := self._calls.get(step, 0):  # steps, and the calls of each, come last first
            call = self._turn[step] = (self._turn.get(step, 0) - 1) % count
        now = with_heads(tuple(x.detach() for x in given))  # type: ignore[arg-type]  # three of them

        def contract(x: Tensor, gradient: Tensor) -> None:
            self._contract(x, gradient, now, scale, step, call)

        return self.watch(made, contract)

    def _keep(self, given: Projections) -> None:
        step = self.clock.step
        if step < self._last or self.clock.samplings != self._sampling:
            for held in (self._kept, self._calls, self._turn, self._begun):
                held.clear()
            self._first, self._sampling = step, self.clock.samplings
        self._last, self._total = step, self.clock.total
        self._calls[step] = self._calls.get(step, 0) + 1
        if any(every and self._since(step, every) == 0 for every in self._every.values()):
            q, k, v = (x.detach().clone() for x in with_heads(given))
            self._kept.setdefault(step, []).append((q, k, v))

    def _since(self, step: int, every: int) -> int:
        """Steps since the last dense one of a choice with a dense step in `every`."""
        begun = step
        while begun > self._first and self._range(begun - 1) == self._range(step):
            begun -= 1
        return (step - begun) % every

    def _range(self, step: int) -> int:
        return self.ranges.of(step, self._total) if len(self.ranges) > 1 else 0

    def _contract(
        self,
        x: Tensor,
        gradient: Tensor,
        now: Projections,
        scale: float | None,
        step: int,
        call: int,
    ) -> None:
        found = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for scheme in self.variants:
                every = self._every[scheme]
                stale = self._since(step, every) if every else 0
                if every and not stale:
                    found.append(torch.zeros((), device=x.device))
                    continue
                output = self._output(scheme, step - stale, call, scale)(now, stale)
                moved = (output.view_as(x) - x).float()
                product = gradient.float() * moved
                found.append((product.square() if self.squared else product).sum())
        self.add(list(self.variants.values()), torch.stack(found))

    def _output(self, scheme: Scheme, dense: int, call: int, scale: float | None) -> Any:
        """(projections, steps since the dense one) -> output, by the statistics of a dense step."""
        key = (scheme, dense, call)
        if key not in self._begun:
            for other in [k for k in self._begun if k[0] == scheme and k[1] != dense]:
                del self._begun[other]
            before = self._kept[dense][call] if self._every[scheme] else None
            self._begun[key] = attention_plugin(scheme.attention).made(
                scheme.attention,
                self.spec,
                before,
                self.drifts.get((self.spec.site, scheme)),
                scale,
            )
        return self._begun[key]
