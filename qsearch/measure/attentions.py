"""Attentions as a plan has them: one object for each site, which follows the sampler's steps and
carries what its choice carries.

What `simulate` and packed models route attention to (`sparse.py`), and what calibration measures
for choices that are fitted. A choice that carries statistics begins with a dense step: where a
sampling begins, and, of choices over ranges of steps, where each range begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..choices.attention import AbstractSparseAttention, attention_plugin
from ..core.attention_words import attention_word
from ..core.attentions import PART, AttentionSpec
from ..core.cost import Choices
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.sites import cut, is_site
from ..core.steps import StepClock, StepRanges
from .attention import passing
from .calls import Call, run

#: (site, choice) -> what calibration chose for it
Drifts = Mapping[tuple[str, Scheme], Tensor]


class RangedAttention:
    """An attention by the choice of each range of steps, or by one for all.

    Args:
        parts: what computes it in each range; None where it is dense.
        steps: the ranges.
        clock: of the denoiser.
    """

    def __init__(
        self,
        parts: Sequence[AbstractSparseAttention | None],
        steps: StepRanges,
        clock: StepClock,
    ) -> None:
        self.parts, self.steps, self.clock = tuple(parts), steps, clock
        self._place, self._sampling = 0, clock.samplings

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, step: int) -> Tensor:
        """The output [batch, heads, T, head size] at a sampler's step."""
        place = self.clock.range_of(self.steps) if len(self.parts) > 1 else 0
        if (place, self.clock.samplings) != (self._place, self._sampling):
            self.reset()
            self._place, self._sampling = place, self.clock.samplings
        own = self.parts[place]
        if own is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return own.attend(q, k, v, scale=scale, step=step)

    def reset(self) -> None:
        """Nothing is carried over from before."""
        for part in self.parts:
            if part is not None:
                part.reset()


def planned_attentions(
    graph: OpGraph,
    choices: Mapping[str, Choices],
    steps: StepRanges,
    clock: StepClock,
    drifts: Drifts,
) -> dict[str, AbstractSparseAttention]:
    """Module -> its attention as `choices` (of sites and layers) have it; dense ones are left out.

    Raises:
        QSearchError: a fitted choice without calibration.
    """
    made: dict[str, AbstractSparseAttention] = {}
    for name, held in choices.items():
        if is_site(name) and cut(name)[1] == PART and any(s.attention for s in held):
            spec = graph.self_attentions[cut(name)[0]]
            parts = [_made(spec, scheme, drifts) if scheme.attention else None for scheme in held]
            made[spec.module] = RangedAttention(parts, steps, clock)
    return made


def carries(choices: Mapping[str, Choices]) -> bool:
    """Whether some attention carries something from step to step."""
    return any(s.carried for held in choices.values() for s in held)


def _made(spec: AttentionSpec, scheme: Scheme, drifts: Drifts) -> AbstractSparseAttention:
    plugin, drift = attention_plugin(scheme.attention), drifts.get((spec.site, scheme))
    if drift is None and plugin.fitted(scheme.attention):
        raise QSearchError(
            f"{scheme} at {spec.module} is fitted on calls of consecutive steps, and no "
            "calibration was given; give what "
            "`weights_for` makes of the plan and recorded calls, or a drift in numbers "
            "such as ~drift0.02"
        )
    return plugin.simulated(scheme.attention, spec, drift)


def fitted(choices: Mapping[str, Iterable[Scheme]]) -> dict[str, list[Scheme]]:
    """Site -> those of its choices that calibration fits."""
    found = {
        name: [s for s in held if s.attention and attention_word(s.attention).fitted(s.attention)]
        for name, held in choices.items()
        if is_site(name)
    }
    return {name: list(dict.fromkeys(held)) for name, held in found.items() if held}


@torch.no_grad()
def fit_drifts(
    model: nn.Module,
    graph: OpGraph,
    wanted: Mapping[str, Iterable[Scheme]],
    calls: Sequence[Call],
) -> dict[tuple[str, Scheme], Tensor]:
    """What calibration chooses for fitted choices, by recorded calls of all steps.

    Args:
        model: the denoiser in full precision.
        graph: its graph.
        wanted: site -> its choices.
        calls: recorded calls; those of one step are parts of one batch.

    Raises:
        QSearchError: calls that are not of consecutive steps.
    """
    asked = fitted(wanted)
    if not asked:
        return {}
    by_step: dict[int, list[Call]] = {}
    for call in calls:
        by_step.setdefault(call.step, []).append(call)
    order = sorted(by_step)
    if not order or order != list(range(order[0], order[0] + len(order))):
        site, schemes = next(iter(asked.items()))
        raise QSearchError(
            f"{schemes[0]} at {site} is fitted on calls of consecutive steps; these are "
            f"of the steps {order}: record every step "
            "(calibrate.bins as many as sampling.steps)"
        )
    seen: dict[tuple[str, Scheme], list[Tensor]] = {}

    def listen(
        site: str,
        now: dict[tuple[str, Scheme], list[Tensor]],
        made: Tensor,
        given: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
    ) -> Tensor:
        spec = graph.self_attentions[cut(site)[0]]
        for scheme in asked[site]:
            found = attention_plugin(scheme.attention).observed(
                scheme.attention, spec, with_heads(given), scale
            )
            now.setdefault((site, scheme), []).append(found)
        return made

    for step in order:
        now: dict[tuple[str, Scheme], list[Tensor]] = {}
        with passing(model, {site: partial(listen, site, now) for site in asked}):
            for call in by_step[step]:
                run(model, call)
        for key, found in now.items():
            seen.setdefault(key, []).append(torch.stack(found).mean(0))
    return {
        (site, scheme): attention_plugin(scheme.attention).fit(
            scheme.attention, graph.self_attentions[cut(site)[0]], found
        )
        for (site, scheme), found in seen.items()
    }


def with_heads(given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, T, head size] of an attention that may have no axis
    of heads.
    """
    q, k, v = (x[:, None] if x.ndim == 3 else x for x in given)
    return q, k, v
