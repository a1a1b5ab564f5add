"""Scores of a predictor: how well it ranks plans (Spearman, Kendall, NDCG@10), and how wide its
calibrated intervals are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..core.errors import QSearchError
from ..core.metrics import metric_words
from .features import Array

TOP = 10


@dataclass(frozen=True)
class Scores:
    """`spearman`, `kendall`, `ndcg` (at `TOP`, linear gains over the range of what was measured),
    `error` (root mean square), of `plans` held-out predictions.
    """

    spearman: float
    kendall: float
    ndcg: float
    error: float
    plans: int


def score(predicted: Array, measured: Array, *, lower_is_better: bool = False) -> Scores:
    """Scores of held-out predictions. Raises `QSearchError` where the measured values are all the
    same: nothing could be ranked.
    """
    from scipy.stats import kendalltau, spearmanr
    from sklearn.metrics import ndcg_score

    if len(measured) < 3:
        raise QSearchError(f"a ranking needs three plans or more; given {len(measured)}")
    if float(np.ptp(measured)) == 0.0:
        raise QSearchError(
            f"a metric that never varies can't be ranked; all {len(measured)} plans have "
            f"{measured[0]:g}: measure coarser plans, or another metric"
        )
    error = float(np.sqrt(np.mean((predicted - measured) ** 2)))
    if float(np.ptp(predicted)) == 0.0:
        return Scores(0.0, 0.0, float("nan"), error, len(measured))
    sign = -1.0 if lower_is_better else 1.0
    gain = sign * measured - (sign * measured).min()
    ndcg = float(ndcg_score(gain[None] / gain.max(), sign * predicted[None], k=TOP))
    return Scores(
        float(spearmanr(predicted, measured).statistic),
        float(kendalltau(predicted, measured).statistic),
        ndcg,
        error,
        len(measured),
    )


def linked(metric: str, values: Array) -> Array:
    """A metric on the scale on which it is learnt and explained, as its plug-in declares it
    (`core.metrics`).
    """
    return metric_words(metric).linked(values)


def unlinked(metric: str, values: Array) -> Array:
    """The inverse of `linked`."""
    return metric_words(metric).unlinked(values)


def half_width(residuals: Array, coverage: float) -> float:
    """Half the width of an interval that holds a new plan with probability `coverage`, from
    held-out residuals: split conformal prediction.

    The ceil((n + 1) coverage)-th smallest absolute residual (Lei et al. 2018, Journal of the
    American Statistical Association 113, section 2.2); infinite where there are too few residuals
    for such a promise.
    """
    rank = math.ceil((len(residuals) + 1) * coverage)
    return float(np.sort(np.abs(residuals))[rank - 1]) if rank <= len(residuals) else math.inf
