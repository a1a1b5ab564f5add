"""Attentions of a packed model: routed to what the plan says from then on, and written down in the
packed file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attentions import PART
from ..core.cost import Choices
from ..core.graph import OpGraph
from ..core.plan import said
from ..core.scheme import Scheme
from ..core.sites import cut, is_site
from ..core.steps import StepRanges, clock_of
from ..measure.attentions import Drifts, carries, planned_attentions
from ..measure.sparse import route


class AttentionSwitch:
    """A hook on a denoiser: before each call, its clock is asked for the sampler's step, where
    attentions go by it.

    Attributes:
        choices: site -> its choices.
        steps: the ranges of steps.
        drifts: what calibration chose.
    """

    def __init__(self, choices: Mapping[str, Choices], steps: StepRanges, drifts: Drifts) -> None:
        self.choices, self.steps, self.drifts = dict(choices), steps, dict(drifts)
        self.asks = carries(choices) or any(len(held) > 1 for held in choices.values())

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the sampler's step is found outside of what is compiled
    def __call__(self, root: nn.Module, args: Any) -> None:
        """Before a call of `root`."""
        if self.asks:
            clock_of(root).step_in_call(root)


def attention_choices(choices: Mapping[str, Choices]) -> dict[str, Choices]:
    """The whole attentions among the sites and layers of a plan."""
    return {name: held for name, held in choices.items() if is_site(name) and cut(name)[1] == PART}


def follow_attentions(
    model: nn.Module,
    roots: Iterable[nn.Module],
    graph: OpGraph,
    choices: Mapping[str, Choices],
    steps: StepRanges,
    drifts: Drifts,
) -> None:
    """Let attentions of `model` be computed as `choices` say from now on; nothing where they are
    dense.
    """
    held = list(roots)
    mine = attention_choices(choices)
    clock = clock_of(held[0])
    attentions = planned_attentions(graph, mine, steps, clock, drifts)
    if attentions:
        used = {
            (site, s): drifts[site, s]
            for site, own in mine.items()
            for s in own
            if (site, s) in drifts
        }
        switch = AttentionSwitch(mine, steps, used)
        for root in held:
            root.register_forward_pre_hook(switch)
        route(model, attentions, lambda: clock.step)


def attentions_in(model: nn.Module) -> AttentionSwitch | None:
    """What a packed model's attentions follow; None where they are dense."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, AttentionSwitch):
                return hook
    return None


def written(switch: AttentionSwitch) -> dict[str, Any]:
    """Plain data for the header of a packed file."""
    drifts: dict[str, dict[str, Any]] = {}
    for (site, scheme), table in switch.drifts.items():
        drifts.setdefault(site, {})[str(scheme)] = table.tolist()
    return {"sites": said(switch.choices), "steps": switch.steps.content(), "drifts": drifts}


def read(content: Mapping[str, Any]) -> tuple[dict[str, Choices], StepRanges, Drifts]:
    """The inverse of `written`: choices, ranges and drifts."""
    choices = {
        site: tuple(map(Scheme.parse, [text] if isinstance(text, str) else text))
        for site, text in content["sites"].items()
    }
    drifts: dict[tuple[str, Scheme], Tensor] = {
        (site, Scheme.parse(text)): torch.tensor(table)
        for site, row in content["drifts"].items()
        for text, table in row.items()
    }
    return choices, StepRanges.parse(content["steps"]), drifts
