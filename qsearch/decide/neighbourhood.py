"""The choices around a plan: what refinement may move a layer to, over the plan's ranges of sampler
steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.cost import can_have
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.plan_choices import nearest_active
from ..core.scheme import KEEP, Scheme
from .problem import Choice, schemes_of


def choice_of(plan: Plan, layer: str) -> Choice:
    """The choice of a layer: a scheme, or one for each range of steps."""
    held = plan.choices[layer]
    return held[0] if len(held) == 1 else held


def around(
    graph: OpGraph, plan: Plan, offered: Sequence[Scheme], share: str
) -> dict[str, list[Choice]]:
    """Layer -> its choices, the plan's own last.

    Of a plan with one range, every scheme that is offered. Of one with several, every scheme in all
    ranges; every weight that is offered, each range keeping its own input; and, where the ranges
    share nothing, every scheme in one range alone.

    Args:
        graph: the model's graph.
        plan: where to stand.
        offered: schemes.
        share: "weights" or "none", as in `decide.ranges.SHARES`.
    """
    count = len(plan.steps)
    found: dict[str, list[Choice]] = {}
    for layer in graph.quantizable:
        now = choice_of(plan, layer.name)
        held = schemes_of(now) if count > 1 else ()
        held = held * count if len(held) == 1 else held
        made: list[Choice] = []
        for scheme in (s for s in offered if can_have(layer, s)):
            apart = share == "none" and count > 1 and scheme.fitted_by_range
            made.append((scheme,) * count if apart else scheme)
            if not held:
                continue
            if scheme != KEEP:
                made += [_plain(tuple(scheme.with_input(own) for own in held), share)]
            if share == "none":
                made += [_plain((*held[:i], scheme, *held[i + 1 :]), share) for i in range(count)]
        places = nearest_active(graph.active(layer.name, plan.steps) or (0,), count)
        made = [
            c if isinstance(c, Scheme) else _plain(tuple(c[i] for i in places), share) for c in made
        ]
        found[layer.name] = [*dict.fromkeys(c for c in made if c != now and _shared(c, share)), now]
    return found


def plans_around(graph: OpGraph, plan: Plan, offered: Sequence[Scheme], share: str) -> list[Plan]:
    """Plans that between them hold every choice around a plan: what calibration must serve."""
    options = around(graph, plan, offered, share)
    kept = {layer.name: KEEP for layer in graph if not layer.quantizable}
    most = max(map(len, options.values()), default=0)
    return [
        Plan.make(
            graph,
            {**kept, **{n: held[min(k, len(held) - 1)] for n, held in options.items()}},
            steps=plan.steps,
        )
        for k in range(most)
    ]


def _plain(choice: tuple[Scheme, ...], share: str) -> Choice:
    """One scheme where all ranges have it and nothing in it is fitted for each."""
    if len(set(choice)) == 1 and not (share == "none" and choice[0].fitted_by_range):
        return choice[0]
    return choice


def _shared(choice: Choice, share: str) -> bool:
    """Whether a choice keeps to what the ranges share: one stored weight, which no transform scales
    for a range alone.
    """
    schemes = schemes_of(choice)
    if share == "none" or len(schemes) == 1:
        return True
    return len({s.weight_only for s in schemes}) == 1 and not any(s.scales_weight for s in schemes)
