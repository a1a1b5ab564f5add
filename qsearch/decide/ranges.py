"""How a plan may differ between ranges of sampler steps: the choices of a site over the ranges, and
what each range loses by them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.attentions import PART
from ..core.errors import QSearchError, nearest
from ..core.interactions import Scores, scores_of
from ..core.plan import ONE_RANGE
from ..core.plan_choices import nearest_active
from ..core.scheme import KEEP, Scheme
from ..core.sites import cut, is_site
from ..core.steps import StepRanges
from ..core.table import SensitivityTable
from .objectives import Objective, Values
from .problem import Choice, schemes_of

#: what is looked at for one site: schemes over the ranges of steps
COMBINATIONS = 4096
#: what the ranges of a plan have in common
SHARES = ("weights", "none")


@dataclass(frozen=True)
class Ranges:
    """How a plan may differ between ranges of sampler steps.

    Attributes:
        steps: the ranges.
        values: layer -> scheme -> what each range adds to the loss of all steps.
        options: layer -> its choices over the ranges, where they are spelt out; their losses then
            stand by `label` among the values of all steps.
        share: "weights" where a layer has one stored weight for all ranges and its input may
            differ, "none" where each range may store its own.
    """

    steps: StepRanges = ONE_RANGE
    values: Sequence[Values] = ()
    share: str = "weights"
    options: Mapping[str, Sequence[Choice]] | None = None

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise QSearchError(
                f"ranges of steps share {' or '.join(SHARES)}; given {self.share!r}"
                f"{nearest(self.share, SHARES)}"
            )

    def choices(
        self, schemes: Sequence[Scheme], layer: str, active: Sequence[int] | None = None
    ) -> list[Choice]:
        """Every choice over the ranges that `schemes` make, one for all of them first; of those
        that are spelt out, the same.

        Args:
            schemes: what the layer may have.
            layer: its name.
            active: the ranges in which its component runs, all when left out; the others go with
                the nearest of them.
        """
        made: list[Choice] = list(schemes)
        if self.options is not None:
            return [c for c in self.options[layer] if set(schemes_of(c)) <= set(made)]
        active = range(len(self.steps)) if active is None else active
        count = len(active)
        if count <= 1:
            return made
        places = [active.index(i) for i in nearest_active(active, len(self.steps))]
        families: dict[Scheme, list[Scheme]] = {}
        for scheme in schemes:
            key = KEEP if self.share == "none" else scheme.weight_only
            families.setdefault(key, []).append(scheme)
        if sum(len(f) ** count for f in families.values()) > COMBINATIONS:
            raise QSearchError(
                f"{len(schemes)} schemes at {layer} over {count} ranges of steps are more "
                "combinations than can be looked at "
                f"({COMBINATIONS}); give fewer schemes or ranges, or share weights"
            )
        for family in families.values():
            for combination in itertools.product(family, repeat=count):
                fitted = any(s.scales_weight for s in combination) and self.share == "weights"
                if len(set(combination)) > 1 and not fitted:
                    made.append(tuple(combination[i] for i in places))
        return made

    def loss(self, layer: str, choice: tuple[Scheme, ...]) -> float:
        """What a choice for each range adds to the loss."""
        rows = (values.get(layer, {}) for values in self.values)
        return sum(
            0.0 if scheme == KEEP else row[str(scheme)]
            for row, scheme in zip(rows, choice, strict=True)
        )


def counted(steps: StepRanges, table: SensitivityTable) -> StepRanges:
    """Ranges whose costs are counted for as many sampler steps as the trajectories of a table have;
    as they are without any.
    """
    responses = table.responses
    lengths = {v.shape[1] for v in responses.values.values()} if responses is not None else set()
    total = max(lengths, default=1)
    return steps.counted(total) if total > 1 else steps


def range_scores(
    table: SensitivityTable, objective: Objective, steps: StepRanges
) -> tuple[Scores, ...] | None:
    """The scores of each range of steps, from trajectories that probes went through; None where the
    table has no such.
    """
    responses, weights = table.responses, objective.weights
    if responses is None or objective.decibels or not all(map(responses.has, weights)):
        return None
    if len(steps) == 1:
        return (scores_of(responses, weights),)
    total = counted(steps, table).total
    if total < len(steps):
        return None
    return tuple(scores_of(responses, weights, own) for own in steps.members(total))


def ranges_of(
    table: SensitivityTable, objective: Objective, steps: StepRanges, share: str = "weights"
) -> Ranges:
    """The ranges with what each adds to the loss, by the step bins (or the sampler steps of a
    trajectory) of a table.

    Raises:
        QSearchError: an objective that is no sum over the steps, or a range without a bin of its
            own.
    """
    steps = counted(steps, table)
    if len(steps) == 1:
        return Ranges(steps)
    if objective.decibels or objective.at_most:
        raise QSearchError(
            "a plan over ranges of steps minimises losses that add up over the steps: "
            "leave decibels and at_most out"
        )
    parts: list[dict[str, dict[str, float]]] = [{} for _ in range(len(steps))]
    for metric, weight in objective.weights.items():
        for part, losses in zip(parts, _by_range(table, metric, steps), strict=True):
            for site, row in losses.items():
                mine = part.setdefault(site, {})
                for scheme, loss in row.items():
                    mine[scheme] = mine.get(scheme, 0.0) + weight * loss
    return Ranges(steps, tuple(parts), share)


def _by_range(
    table: SensitivityTable, metric: str, steps: StepRanges
) -> list[dict[str, dict[str, float]]]:
    """What each range adds to the loss. A layer's weight errs alike in all steps, so that a range
    has its share of the whole error; an attention's choice begins anew in each range, and a range
    has the error of the choice there alone.
    """
    count = table.bins(metric)
    cell = (metric, 0)
    responses = table.responses
    if count == 1 and responses is not None and cell in responses.values:
        length = responses.values[cell].shape[1]
        if length >= len(steps):
            found: list[dict[str, dict[str, float]]] = [{} for _ in range(len(steps))]
            members = steps.members(length)
            for row, (site, scheme) in enumerate(responses.choices):
                if is_site(site) and cut(site)[1] == PART:
                    own = responses.of(cell, [row])
                    losses = [responses.error(cell, [], own[list(mine)])[0] for mine in members]
                else:
                    shares = responses.step_shares(cell, row)
                    losses = [float(np.sum(shares[list(mine)])) for mine in members]
                for part, loss in zip(found, losses, strict=True):
                    part.setdefault(site, {})[scheme] = loss
            return found
    bins: list[list[int]] = [[] for _ in range(len(steps))]
    for b in range(count):
        bins[steps.of(2 * b + 1, 2 * count)].append(b)
    if not all(bins):
        raise QSearchError(
            f"{len(steps)} ranges of steps need a step bin each; the table has {count}, "
            f"and range {bins.index([])} "
            f"has none: profile with --bins {len(steps)} or a multiple"
        )
    return [
        {
            site: {s: loss * len(mine) / count for s, loss in row.items()}
            for site, row in table.values(metric, mine).items()
        }
        for mine in bins
    ]
