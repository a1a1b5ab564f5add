"""Whole attentions in a problem: their choices beside those of layers, and what each costs.

Nothing of an attention is stored, so what it does in one range of steps costs nothing in another:
of the combinations over the ranges those are kept that no other one beats in loss and in every cost
at once, range by range. One choice for all steps is offered besides, since what it carries goes on
where a range would begin with a dense step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.attentions import AttentionSpec, attention_bit_operations, attention_share, dense_macs
from ..core.cost import Budget
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.scheme import FULL_BITS, KEEP, Scheme
from .objectives import Values
from .problem import Choice
from .ranges import COMBINATIONS, Ranges

Matrix = NDArray[np.float64]
#: limits that attentions count towards
LIMITS = ("attention_share", "total_bit_operations", "latency")


@dataclass(frozen=True)
class AttentionSite:
    """An attention with its choices.

    Attributes:
        spec: the attention.
        choices: one for all steps, or one for each range of them.
        values: what each choice loses.
        costs: limit -> what each choice adds to it.
    """

    spec: AttentionSpec
    choices: tuple[Choice, ...]
    values: Matrix
    costs: dict[str, Matrix]


def attention_sites(
    graph: OpGraph,
    values: Values,
    schemes: Sequence[Scheme | str] | None,
    ranges: Ranges,
    budget: Budget,
    latency: Latency | None,
) -> list[AttentionSite]:
    """The attentions that `values` names.

    Args:
        graph: the model's graph.
        values: site -> choice -> loss, over all steps.
        schemes: the choices that are asked for; all of those in `values` when left out.
        ranges: how choices may differ between ranges of steps, with the losses of each.
        budget: limits.
        latency: a table of times, for a budget in seconds.

    Raises:
        QSearchError: for more combinations over the ranges than can be looked at.
    """
    allowed = None if schemes is None else {Scheme.parse(s) for s in schemes} | {KEEP}
    limits = [name for name in budget.limits if name in LIMITS]
    found = []
    for spec in graph.self_attentions.values():
        if spec.site not in values:
            continue
        options = [
            s
            for s in dict.fromkeys([KEEP, *map(Scheme.parse, values[spec.site])])
            if allowed is None or s in allowed
        ]
        asked = _Prices(graph, spec, tuple(options), limits, latency)
        rows = np.column_stack([_losses(values, spec, options), asked.over(ranges.steps.total)])
        choices: list[Choice] = list(options)
        kept = list(range(len(choices)))
        if len(ranges.steps) > 1:
            wide, more = _over_ranges(spec, options, asked, ranges)
            choices, rows = choices + wide, np.concatenate([rows, more])
            kept = undominated(rows)
        found.append(
            AttentionSite(
                spec,
                tuple(choices[k] for k in kept),
                rows[kept, 0],
                {name: rows[kept, 1 + i] for i, name in enumerate(limits)},
            )
        )
    return found


def attention_rest(
    graph: OpGraph, sites: Sequence[AttentionSite], limit: str, latency: Latency | None
) -> float:
    """What attentions that are no sites add to a limit; of latency, what the table's rest counts
    twice, below zero.
    """
    held = sum(site.spec.macs for site in sites)
    if limit == "attention_share":
        whole = sum(spec.macs for spec in graph.self_attentions.values())
        return 1.0 - held / whole if whole else 1.0
    if limit == "total_bit_operations":
        return float((dense_macs(graph) - held) * FULL_BITS * FULL_BITS)
    if limit == "latency" and latency is not None:
        return -sum(latency.of(site.spec.site, KEEP) for site in sites)
    return 0.0


def undominated(rows: Matrix) -> list[int]:
    """Indices of the rows that no other row beats: at most as large everywhere, and smaller
    somewhere; of equal rows the first.
    """
    order = np.lexsort(rows.T[::-1])
    kept: list[int] = []
    for k in order.tolist():
        if not kept or not (rows[kept] <= rows[k]).all(axis=1).any():
            kept.append(k)
    return sorted(kept)


@dataclass(frozen=True)
class _Prices:
    """What choices of an attention add to limits."""

    graph: OpGraph
    spec: AttentionSpec
    options: tuple[Scheme, ...]
    limits: Sequence[str]
    latency: Latency | None

    def over(self, steps: int) -> Matrix:
        """[choices, limits] of so many steps from a dense one on, as if they were all."""
        rows = [[self._price(s, limit, steps) for limit in self.limits] for s in self.options]
        return np.array(rows, float).reshape(len(self.options), len(self.limits))

    def _price(self, scheme: Scheme, limit: str, steps: int) -> float:
        if limit == "attention_share":
            whole = sum(one.macs for one in self.graph.self_attentions.values())
            return self.spec.macs / whole * attention_share(self.spec, scheme, steps)
        if limit == "total_bit_operations":
            return attention_bit_operations(self.spec, scheme, FULL_BITS, steps)
        assert self.latency is not None
        return self.latency.of(self.spec.site, scheme)


def _losses(values: Values, spec: AttentionSpec, options: Sequence[Scheme]) -> Matrix:
    row = values.get(spec.site, {})
    return np.array([0.0 if s == KEEP else row[str(s)] for s in options])


def _over_ranges(
    spec: AttentionSpec, options: Sequence[Scheme], prices: _Prices, ranges: Ranges
) -> tuple[list[Choice], Matrix]:
    """Combinations with a choice for each range, and their losses and costs; range after range,
    without those that are beaten.
    """
    made: list[tuple[Scheme, ...]] = [()]
    rows = np.zeros((1, 1 + len(prices.limits)))
    steps = ranges.steps
    for share, length, values in zip(steps.shares, steps.lengths, ranges.values, strict=True):
        own = np.column_stack([_losses(values, spec, options), share * prices.over(length)])
        mine = undominated(own)
        joined = (rows[:, None] + own[mine][None]).reshape(-1, rows.shape[1])
        if len(joined) > COMBINATIONS:
            raise QSearchError(
                f"{len(options)} choices of {spec.module} over {len(ranges.steps)} ranges "
                "of steps are more combinations than "
                f"can be looked at ({COMBINATIONS} at a time); give fewer choices or ranges"
            )
        longer = [(*first, options[k]) for first in made for k in mine]
        kept = undominated(joined)
        made, rows = [longer[k] for k in kept], joined[kept]
    several = [i for i, combination in enumerate(made) if _differs(combination)]
    return [made[i] for i in several], rows[several]


def _differs(combination: tuple[Scheme, ...]) -> bool:
    """Whether a combination is another thing than its one choice for all steps."""
    return len(set(combination)) > 1 or combination[0].carried
