"""How well are plans predicted that nobody measured? Learning curves on the zoo's measured plans,
beside baselines and the measurement's own reliability.

    python notebooks/figures/measured_plans.py scenes-dit   # first; scenes-unet; both with --table
    python notebooks/figures/surrogates.py [--folder FOLDER --models scenes-dit scenes-unet --sizes
    16 64 256 --repeats 10 --gnn 2]

Of each model's plans, 16, 64 and 256 drawn at random are learnt from and all others predicted,
`--repeats` times: Spearman, its mean and its spread over draws. Beside them: average bits, the
probes' prediction alone (no learning), Qua²SeDiMo's features (method, bits and weights of each
layer's kind, without the table) in the same learner, and the ceiling: Spearman between two halves
of the captions, stepped up to the whole by Spearman and Brown's formula. Then one surrogate over
both architectures, and each architecture predicted from the other alone. Points of the curves are
kept in FOLDER/MODEL/curves.json, each with the number of plans that there were. Writes
surrogates.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from figure import publish
from measured_plans import FOLDER
from scipy.stats import spearmanr

from qsearch import zoo
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.core.table import SensitivityTable
from qsearch.core.trials import Trials
from qsearch.learn.data import Data
from qsearch.learn.fitting import Study, TrainingSet, cross_validate, fit, training_set
from qsearch.learn.scores import score

METRICS = ("sqnr", "alignment")
SIZES = (16, 64, 256)
GNN_SIZES = (64,)  # minutes of one core for each of the others
TABLES = ("trajectory.parquet", "step.parquet")


def study_in(folder: Path) -> Study:
    """What measured_plans.py left in a model's folder."""
    graph = OpGraph.load(folder / "graph.json")
    tables = tuple(
        SensitivityTable.load(folder / name, graph.id)
        for name in TABLES
        if (folder / name).is_file()
    )
    return Study(graph, Trials(folder / "trials.db", graph).measured(), tables)


def ceiling(study: Study, metric: str, seed: int = 0, repeats: int = 200) -> float:
    """Spearman of a metric between two random halves of the captions, stepped up to all of them:
    what no predictor of other captions can exceed.
    """
    dice = np.random.default_rng(seed)
    samples = np.array([trial.samples[metric] for trial in study.trials])
    found = []
    for _ in range(repeats):
        order = dice.permutation(samples.shape[1])
        half = samples.shape[1] // 2
        r = float(
            spearmanr(
                samples[:, order[:half]].mean(1), samples[:, order[half : 2 * half]].mean(1)
            ).statistic
        )
        found.append(2 * r / (1 + r))
    return float(np.mean(found))


def without_table(taken: TrainingSet) -> TrainingSet:
    """The columns that Qua²SeDiMo's node features amount to: bits and methods by role, block and
    depth; no prediction.
    """
    keep = [
        i
        for i, name in enumerate(taken.data.columns)
        if name == "bits" or name.startswith(("lost/", "share/"))
    ]
    return replace(
        taken, data=Data(tuple(taken.data.columns[i] for i in keep), taken.data.values[:, keep])
    )


def curve(
    taken: TrainingSet, kind: str, size: int, repeats: int, seed: int = 0
) -> dict[str, float]:
    """Mean and standard deviation over draws of the held-out Spearman, learning from `size`
    plans.
    """
    learn, found = plugins.load("surrogates", kind).fit, []
    count = len(taken.target)
    for i in range(repeats):
        order = np.random.default_rng([seed, size, i]).permutation(count)
        known, asked = order[:size], order[size:]
        predicted = learn(taken.data.rows(known), taken.target[known], i).predict(
            taken.data.rows(asked)
        )
        found.append(score(predicted, taken.target[asked]).spearman)
    return {
        "SRCC": float(np.mean(found)),
        "spread": float(np.std(found, ddof=1)) if repeats > 1 else float("nan"),
        "held out": count - size,
    }


def alone(taken: TrainingSet, column: str) -> float:
    """Spearman of one column with the target, the sign made right."""
    return abs(
        float(
            spearmanr(
                taken.data.values[:, taken.data.columns.index(column)], taken.target
            ).statistic
        )
    )


def main() -> None:
    """Curves, baselines, ceilings, across architectures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--models", nargs="*", default=zoo.NAMES)
    parser.add_argument(
        "--gnn", type=int, default=2, help="draws for the graph predictor; 0 leaves it out"
    )
    o = parser.parse_args()
    studies = {name: study_in(o.folder / name) for name in o.models}
    rows: list[dict[str, Any]] = []
    for name, study in studies.items():
        kept_in = o.folder / name / "curves.json"
        kept: dict[str, dict[str, Any]] = (
            json.loads(kept_in.read_text()) if kept_in.is_file() else {}
        )
        for metric in METRICS:
            taken = training_set([study], metric, "ridge")
            fixed = {"model": name, "metric": metric, "plans": len(study.trials)}
            known = {
                "split-half ceiling": ceiling(study, metric),
                "average bits alone": alone(taken, "bits"),
            }
            known["probes alone"] = alone(taken, f"{metric}/plan")
            known["probes alone, summed"] = alone(taken, f"{metric}/sum")
            rows += [
                fixed
                | {
                    "predictor": p,
                    "learnt from": 0,
                    "SRCC": v,
                    "spread": float("nan"),
                    "held out": len(study.trials),
                }
                for p, v in known.items()
            ]
            learners = {
                "ridge": taken,
                "xgboost": taken,
                "ridge, Qua2SeDiMo's features": without_table(taken),
                "xgboost, Qua2SeDiMo's features": without_table(taken),
            }
            if o.gnn:
                known_all = all(f"{metric}, gnn, {size}, {o.gnn}" in kept for size in GNN_SIZES)
                learners["gnn"] = taken if known_all else training_set([study], metric, "gnn")
            for size in o.sizes:
                if size + 24 > len(study.trials):
                    continue
                for label, given in learners.items():
                    kind = label.partition(",")[0]
                    if kind == "gnn" and size not in GNN_SIZES:
                        continue
                    repeats = o.gnn if kind == "gnn" else o.repeats
                    key = f"{metric}, {label}, {size}, {repeats}"
                    if key not in kept:
                        kept[key] = fixed | {
                            "predictor": label,
                            "learnt from": size,
                            **curve(given, kind, size, repeats),
                        }
                        kept_in.write_text(json.dumps(kept))
                    rows.append(kept[key])
                print(name, metric, size, flush=True)
    extra: dict[str, Any] = {"measured": {name: spans(study) for name, study in studies.items()}}
    if set(studies) == set(zoo.NAMES):
        both: list[dict[str, Any]] = []
        for metric in METRICS:
            taken = training_set(list(studies.values()), metric, "ridge")
            for kind in ("ridge", "xgboost"):
                held = {by: cross_validate(taken, kind, by=by) for by in ("plan", "graph")}
                for i, name in enumerate(studies):
                    mine = taken.homes == i
                    found = {
                        by: score(x[mine], taken.target[mine]).spearman for by, x in held.items()
                    }
                    both.append(
                        {
                            "metric": metric,
                            "surrogate": kind,
                            "model": name,
                            "one for both": found["plan"],
                            "from the other alone": found["graph"],
                        }
                    )
        extra["across architectures"] = both
        intervals = []
        for name, study in studies.items():
            made = fit(study.graph, study.trials, study.tables, metric="sqnr", kind="ridge")
            intervals.append(
                {
                    "model": name,
                    "SRCC": made.scores.spearman,
                    "Kendall": made.scores.kendall,
                    "NDCG@10": made.scores.ndcg,
                    "error, dB": made.scores.error,
                }
            )
        extra["cross-validated on all plans, ridge, sqnr"] = intervals
        publish(__file__, intervals, title="Five-fold cross-validation on all plans", seed=0)
        publish(__file__, both, title="Across architectures: Spearman", seed=0)
    publish(
        __file__,
        rows,
        title="Held-out Spearman of predicted with measured plans",
        seed=0,
        extra=extra,
    )


def spans(study: Study) -> dict[str, list[float]]:
    """Of each metric, and of the average bits: smallest, median and largest."""
    values = {m: study.target(m) for m in METRICS} | {
        "average bits": np.array([t.average_bits for t in study.trials])
    }
    return {
        name: [float(np.min(v)), float(np.median(v)), float(np.max(v))]
        for name, v in values.items()
    }


if __name__ == "__main__":
    main()
