"""Boosted trees (xgboost) that start from the table's own prediction and learn what it misses;
TreeSHAP says why.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.artifacts import Header, read_json, write_json
from ...core.errors import ArtifactError
from ..data import AbstractModel, Data, LinearPrior
from ..features import Array

if TYPE_CHECKING:
    from xgboost import Booster

needs_graph = False
SCHEMA = "qsearch.xgboost/1"
_ROUNDS = 300
_SETTINGS = {
    "max_depth": 3,
    "eta": 0.05,
    "subsample": 0.7,
    "colsample_bytree": 0.3,  # many columns say nearly the same
    "min_child_weight": 3,
    "lambda": 3.0,
    "base_score": 0.0,  # the margin is ours
    "nthread": 1,
    "tree_method": "hist",
}
_BACKGROUND = 100
_AT_ONCE = 50  # plans that SHAP explains in one call: of long ones it draws a bar on the screen


class Boosted(AbstractModel):
    """Trees on top of a line through a prior. `background` [some plans, columns]: what SHAP
    compares with.
    """

    def __init__(self, trees: Booster, line: LinearPrior, background: Array) -> None:
        self.trees, self.line, self.background = trees, line, background

    def predict(self, data: Data) -> Array:
        """[plans], the leaves added up in fp64: xgboost's own fp32 sum would miss what SHAP adds up
        to.
        """
        import xgboost

        leaves = (
            self.trees.predict(xgboost.DMatrix(data.values), pred_leaf=True)
            .astype(int)
            .reshape(len(data), -1)
        )
        found: Array = self.line.of(data) + sum(
            values[leaves[:, i]] for i, values in enumerate(_leaf_values(self.trees))
        )
        return found

    def shares(self, data: Data) -> tuple[Array, float]:
        """TreeSHAP, interventional against the plans learnt from, and the line's own part in the
        prior's column.
        """
        import shap

        explainer = shap.TreeExplainer(
            self.trees, self.background, feature_perturbation="interventional"
        )
        parts = [
            explainer.shap_values(data.values[i : i + _AT_ONCE], check_additivity=False)
            for i in range(0, len(data), _AT_ONCE)
        ]
        values = np.concatenate(parts).astype(np.float64)
        known, prior = Data(data.columns, self.background), self.line.column
        if prior is not None:
            values[:, prior] += self.line.slope * (
                data.values[:, prior] - self.background[:, prior].mean()
            )
        return values, float(self.predict(known).mean())

    def save(self, folder: Path) -> None:
        """Write `trees.json` (xgboost's own text) and `margin.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.trees.save_model(folder / "trees.json")
        content = {"line": asdict(self.line), "background": self.background.tolist()}
        write_json(folder / "margin.json", Header(SCHEMA), content)


def fit(data: Data, target: Array, seed: int) -> Boosted:
    """Trees on what a line through the prior leaves over."""
    import xgboost

    line = LinearPrior.through(data, target)
    given = xgboost.DMatrix(data.values, target, base_margin=line.of(data))
    trees = xgboost.train({**_SETTINGS, "seed": seed}, given, _ROUNDS)
    return Boosted(
        trees, line, data.values[np.random.default_rng(seed).permutation(len(data))[:_BACKGROUND]]
    )


def load(folder: Path) -> Boosted:
    """Read `trees.json` and `margin.json`."""
    import xgboost

    _, content = read_json(folder / "margin.json", SCHEMA)
    trees = xgboost.Booster()
    try:
        trees.load_model(folder / "trees.json")
    except xgboost.core.XGBoostError as error:
        raise ArtifactError(
            f"{folder / 'trees.json'} is not readable as xgboost's trees "
            f"({str(error).splitlines()[0]}); fit again"
        ) from error
    return Boosted(trees, LinearPrior(**content["line"]), np.array(content["background"]))


def _leaf_values(trees: Any) -> list[Array]:
    """The value of every node of every tree, by its number: xgboost keeps a leaf's where a split
    would have its threshold.
    """
    model = json.loads(bytes(trees.save_raw("json")))["learner"]["gradient_booster"]["model"]
    return [np.array(tree["split_conditions"], np.float64) for tree in model["trees"]]
