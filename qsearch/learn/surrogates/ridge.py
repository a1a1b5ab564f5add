"""Ridge regression on the standardised features, around the table's own prediction, its penalty
chosen by leave-one-out: readable, hard to fool with few plans.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...core.artifacts import Header, read_json, write_json
from ..data import AbstractModel, Data, LinearPrior
from ..features import Array

needs_graph = False
SCHEMA = "qsearch.ridge/1"
_PENALTIES = np.logspace(-1, 5, 25)


class Ridge(AbstractModel):
    """`weights` [columns] on the features as they are, and an intercept; `centre` [columns]: the
    plans learnt from, on average.
    """

    def __init__(self, weights: Array, intercept: float, centre: Array) -> None:
        self.weights, self.intercept, self.centre = weights, intercept, centre

    def predict(self, data: Data) -> Array:
        """[plans]."""
        return np.asarray(data.values @ self.weights + self.intercept)

    def shares(self, data: Data) -> tuple[Array, float]:
        """Linear, so exact: weight times distance from the average plan learnt from (interventional
        Shapley values).
        """
        return (data.values - self.centre) * self.weights, float(
            self.centre @ self.weights + self.intercept
        )

    def save(self, folder: Path) -> None:
        """Write `ridge.json`."""
        content = {
            "intercept": self.intercept,
            "weights": self.weights.tolist(),
            "centre": self.centre.tolist(),
        }
        write_json(folder / "ridge.json", Header(SCHEMA), content)


def fit(data: Data, target: Array, seed: int) -> Ridge:
    """Weights from plans [plans, columns] and what was measured of them [plans]."""
    from sklearn.linear_model import RidgeCV

    line = LinearPrior.through(data, target)
    centre, spread = data.values.mean(0), data.values.std(0)
    used = spread > 1e-9 * (1 + np.abs(centre))
    scaled = (data.values[:, used] - centre[used]) / spread[used]
    found = RidgeCV(_PENALTIES).fit(scaled, target - line.of(data))
    weights = np.zeros(len(centre))
    weights[used] = found.coef_ / spread[used]
    intercept = float(found.intercept_ - centre @ weights + line.intercept)
    if line.column is not None:
        weights[line.column] += line.slope
    return Ridge(weights, intercept, centre)


def load(folder: Path) -> Ridge:
    """Read `ridge.json`."""
    _, content = read_json(folder / "ridge.json", SCHEMA)
    return Ridge(
        np.array(content["weights"]), float(content["intercept"]), np.array(content["centre"])
    )
