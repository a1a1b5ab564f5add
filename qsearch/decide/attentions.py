"""Whole attentions in a problem: their choices beside those of layers, and what each costs.

What an attention does in one range of steps costs nothing in another, and nothing is stored. So a plan over ranges has a site
for each range of each attention, `MODULE:attention#2`, and the solver never sees combinations of ranges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.attentions import (
    AttentionSpec,
    attention_bit_operations,
    attention_share,
    dense_macs,
)
from ..core.cost import Budget
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.scheme import FULL_BITS, KEEP, Scheme
from ..core.steps import StepRanges
from .objectives import Values
from .problem import Choice

_RANGE = "#"


@dataclass(frozen=True)
class AttentionSite:
    """An attention in one range of steps, or in all.

    Attributes:
        spec: the attention.
        options: its choices.
        values: what each of them loses.
        share: the part of the steps that it holds.
        place: number of the range; None for all steps.
    """

    spec: AttentionSpec
    options: tuple[Scheme, ...]
    values: tuple[float, ...]
    share: float = 1.0
    place: int | None = None

    @property
    def name(self) -> str:
        """Of the site in a problem."""
        return self.spec.site if self.place is None else f"{self.spec.site}{_RANGE}{self.place}"


def attention_sites(
    graph: OpGraph,
    values: Values,
    schemes: Sequence[Scheme | str] | None,
    steps: StepRanges,
    by_range: Sequence[Values],
) -> list[AttentionSite]:
    """The attentions that `values` speak of, one for each range of steps.

    Args:
        graph: the model's graph.
        values: site -> choice -> loss, over all steps.
        schemes: the choices that are asked for; all of those in `values` when left out.
        steps: the ranges.
        by_range: what each range adds to the loss, where there are several.
    """
    allowed = None if schemes is None else {Scheme.parse(s) for s in schemes} | {KEEP}
    found = []
    for spec in graph.self_attentions.values():
        if spec.site not in values:
            continue
        options = tuple(
            s
            for s in dict.fromkeys([KEEP, *map(Scheme.parse, values[spec.site])])
            if allowed is None or s in allowed
        )
        for place in range(len(steps)):
            row = (by_range[place] if len(steps) > 1 else values)[spec.site]
            losses = tuple(0.0 if s == KEEP else row[str(s)] for s in options)
            found.append(
                AttentionSite(
                    spec,
                    options,
                    losses,
                    steps.shares[place],
                    place if len(steps) > 1 else None,
                )
            )
    return found


def attention_costs(
    graph: OpGraph, sites: Sequence[AttentionSite], budget: Budget, latency: Latency | None
) -> dict[str, list[list[float]]]:
    """Limit of a budget -> what each choice of each site adds to it."""
    dense = dense_macs(graph)

    def price(limit: str, site: AttentionSite, scheme: Scheme) -> float:
        if limit == "attention_share":
            return site.share * site.spec.macs / dense * attention_share(site.spec, scheme)
        if limit == "total_bit_operations":
            return site.share * attention_bit_operations(site.spec, scheme, FULL_BITS)
        if limit == "latency":
            assert latency is not None
            return site.share * latency.of(site.spec.site, scheme)
        return 0.0

    return {
        limit: [[price(limit, site, s) for s in site.options] for site in sites]
        for limit in budget.limits
    }


def attention_rest(
    graph: OpGraph, sites: Sequence[AttentionSite], limit: str, latency: Latency | None
) -> float:
    """What the attentions that are no sites add to a limit; of latency, what the table's rest counts twice, below zero."""
    dense = dense_macs(graph)
    held = sum(site.share * site.spec.macs for site in sites)
    if limit == "attention_share":
        return 1.0 - held / dense if dense else 1.0
    if limit == "total_bit_operations":
        return (dense - held) * FULL_BITS * FULL_BITS
    if limit == "latency" and latency is not None:
        return -sum(site.share * latency.of(site.spec.site, KEEP) for site in sites)
    return 0.0


def joined_ranges(chosen: Mapping[str, Choice], count: int) -> dict[str, Choice]:
    """An assignment with the ranges of each attention as one choice."""
    made: dict[str, Choice] = {}
    parts: dict[str, list[Scheme]] = {}
    for name, choice in chosen.items():
        site, mark, place = name.rpartition(_RANGE)
        if mark and place.isdigit() and isinstance(choice, Scheme):
            parts.setdefault(site, [KEEP] * count)[int(place)] = choice
        else:
            made[name] = choice
    return made | {site: tuple(held) for site, held in parts.items()}


def parted_ranges(choices: Mapping[str, Choice], sites: Sequence[str]) -> dict[str, Choice]:
    """The inverse of `joined_ranges` for the sites of a problem: what a plan says of each, `keep` where it says nothing."""
    made = dict(choices)
    for name in sites:
        site, mark, place = name.rpartition(_RANGE)
        if mark and place.isdigit():
            held = choices.get(site, KEEP)
            made[name] = held[int(place)] if isinstance(held, tuple) else held
        elif ":" in name:
            made.setdefault(name, KEEP)
    return made
