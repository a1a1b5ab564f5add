"""Interactions: scores of choices from a table's probes, and how far their products can be trusted,
with few probes and many choices.

With probes s, the error of a plan is E[(sum_l s_l)^2]: a sum of squares, and of products between
layers. Of a few dozen probes the products of unrelated layers are noise of the size 1/sqrt(probes),
and a solver that may choose among thousands of them would find plans whose errors seem to cancel.
So products are shrunk towards zero by the factor that minimises their expected squared error, as
Schäfer and Strimmer (2005, Statistical Applications in Genetics and Molecular Biology 4, 32, table
2, target "diagonal") shrink a correlation matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import QSearchError
from .probe_responses import ProbeResponses

#: layer -> scheme -> one number a probe
Scores = Mapping[str, Mapping[str, NDArray[np.float64]]]


def scores_of(
    responses: ProbeResponses, weights: Mapping[str, float], steps: Sequence[int] | None = None
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """layer -> scheme -> one number a probe, part and step bin, whose mean square is the weighted
    sum of the metrics' estimates, averaged over bins.

    `weights`: metric -> its weight. `steps`: sampler steps of trajectories that are added up, all
    when left out. Numbers of different bins or metrics belong to different sign vectors, and are
    not added up before squaring.
    """
    cells = [(metric, step) for metric, step in responses.values if weights.get(metric, 0.0) > 0]
    columns = []
    for metric, step in cells:
        values = responses.values[metric, step]
        chosen = values if steps is None else values[:, list(steps)]
        summed = chosen.astype(np.float64).sum(1)  # of one trajectory: [choices, probes, parts]
        seen = ~np.isnan(summed).any(0)
        bins = sum(m == metric for m, _ in cells)
        # A cell's estimate is sum over parts of the probes' mean square, over the parts' power.
        power = np.broadcast_to(np.nansum(responses.power[metric, step]) * seen.sum(0), seen.shape)[
            seen
        ]
        columns.append(summed[:, seen] * np.sqrt(weights[metric] / bins / power))
    if missing := sorted(set(weights) - {metric for metric, _ in cells}):
        raise QSearchError(
            f"interactions need what probes leave in the table; of {missing[0]} there is nothing: "
            "take a solver without interactions, or another metric"
        )
    rows = np.concatenate(columns, 1)
    rows *= np.sqrt(rows.shape[1])
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for (site, scheme), row in zip(responses.choices, rows, strict=True):
        found.setdefault(site, {})[scheme] = row
    return found


def shrinkage_weight(scores: NDArray[np.float64]) -> float:
    """Share in [0, 1] of the products between sites that is more than the noise of the probes;
    `scores` [probes, sites, choices].

    1 - sum of the products' variances over the sum of their squares, over pairs of choices at
    different sites, each scaled to mean square
    one: no choice counts more because it is loud. Computed through sums over sites, never over
        pairs: O(probes^2 x sites x choices).
    """
    count = len(scores)
    if count < 3:
        return 0.0
    power = np.sqrt((scores**2).mean(0))
    unit = np.divide(scores, power, out=np.zeros_like(scores), where=power > 0)
    # Over all pairs, minus those of one site with itself (there only one choice is ever taken).
    squares = (_gram(unit.reshape(count, -1)) - _gram_inside(unit)) / count**2
    fourth = ((unit**2).sum((1, 2)) ** 2 - ((unit**2).sum(2) ** 2).sum(1)).sum()
    variances = (fourth / count - squares) / (count - 1)
    return float(np.clip(1 - variances / squares, 0, 1)) if squares > 0 else 0.0


def table_shrinkage_weight(responses: ProbeResponses, metric: str) -> float:
    """`shrinkage_weight` all choices of a table's metric."""
    found = scores_of(responses, {metric: 1.0})
    rows = [
        np.stack(list(row.values()), 1) for row in found.values()
    ]  # a site each: [probes, choices]
    scores = np.zeros((len(rows[0]), len(rows), max(row.shape[1] for row in rows)))
    for i, row in enumerate(rows):
        scores[:, i, : row.shape[1]] = row
    return shrinkage_weight(scores)


def _gram(rows: NDArray[np.float64]) -> float:
    """Sum over all pairs of columns of the square of their inner product: that of the rows' Gram
    matrix, which is smaller.
    """
    return float(((rows @ rows.T) ** 2).sum())


def _gram_inside(scores: NDArray[np.float64]) -> float:
    return sum(_gram(scores[:, i]) for i in range(scores.shape[1]))
