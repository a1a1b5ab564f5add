"""Objectives: what the choices of each layer are worth, from a table of measurements or from what
somebody predicts.

Every metric of a table is a loss against full precision: 0 = as good. The default is noise power,
which adds up over independent choices. A sum of decibels (MixDQ's and ViDiT-Q's own, Q-DiT's too)
is here to be compared with: it buys what is cheap, not what is loud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable

#: layer -> scheme -> loss
Values = Mapping[str, Mapping[str, float]]
CEILING = 120.0  # decibels that count as perfect: full precision has infinitely many


@dataclass(frozen=True)
class Objective:
    """Least weighted sum of metrics.

    Attributes:
        weights: metric -> its weight in the sum.
        at_most: metric -> largest total loss that is allowed, as a limit beside the budget.
        decibels: instead of the loss x, count 10 log10 x, no lower than -120 (a noise power in dB,
            so that its sum is MixDQ's with another sign).
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"noise": 1.0})
    at_most: Mapping[str, float] = field(default_factory=dict)
    decibels: bool = False

    def __post_init__(self) -> None:
        if not self.weights:
            raise QSearchError(
                "an objective needs at least one metric with its weight, e.g. noise: 1"
            )
        for metric, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise QSearchError(
                    "a metric's weight must be finite and not below zero, since every "
                    f"metric is a loss; {metric} has {weight}"
                )
        for metric, limit in self.at_most.items():
            if not limit >= 0:
                raise QSearchError(
                    f"a loss is limited to something at or above zero; {metric} to {limit}"
                )

    def values(self, table: SensitivityTable) -> dict[str, dict[str, float]]:
        """layer -> scheme -> what is minimised; `keep` is among the schemes, with no loss.

        Args:
            table: what every choice costs.

        Returns:
            Losses, added up over layers.
        """
        parts = [(weight, losses(table, metric)) for metric, weight in self.weights.items()]
        shared = [{(site, s) for site, row in part.items() for s in row} for _, part in parts]
        whole = set.intersection(*shared)
        for metric, found in zip(self.weights, shared, strict=True):
            if missing := sorted(set.union(*shared) - found):
                raise QSearchError(
                    "metrics are weighed against each other where all were measured; "
                    f"{metric} lacks {missing[0][1]} at {missing[0][0]}"
                )
        count = _decibels if self.decibels else float
        return {
            site: {
                s: sum(w * count(p[site][s]) for w, p in parts) for s in row if (site, s) in whole
            }
            for site, row in parts[0][1].items()
        }

    def limits(self, table: SensitivityTable) -> dict[str, tuple[Values, float]]:
        """metric -> (its losses, the most that is allowed).

        Args:
            table: what every choice costs.

        Returns:
            Empty where only one metric counts.
        """
        return {metric: (losses(table, metric), limit) for metric, limit in self.at_most.items()}


def losses(table: SensitivityTable, metric: str) -> dict[str, dict[str, float]]:
    """A metric of a table, averaged over the step bins, with `keep` at no loss."""
    return {site: {str(KEEP): 0.0} | row for site, row in table.values(metric).items()}


def predictions(
    graph: OpGraph, schemes: Iterable[Scheme | str], predict: Callable[[str, Scheme], float]
) -> dict[str, dict[str, float]]:
    """The same from anything that predicts the loss of one scheme at one layer (a surrogate's
    attribution, a formula).
    """
    options = [Scheme.parse(s) for s in schemes]
    found = {
        layer.name: {str(s): float(predict(layer.name, s)) for s in options} | {str(KEEP): 0.0}
        for layer in graph.quantizable
    }
    for site, row in found.items():
        for scheme, loss in row.items():
            if not math.isfinite(loss):
                raise QSearchError(
                    f"a predicted loss must be a number; {scheme} at {site} is {loss}"
                )
    return found


def _decibels(loss: float) -> float:
    return max(-CEILING, 10 * math.log10(loss)) if loss > 0 else -CEILING
