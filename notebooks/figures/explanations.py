"""Do explanations add up, are they faithful, and do Qua²SeDiMo's statements hold on the zoo?

    python notebooks/figures/measured_plans.py scenes-dit   # first; scenes-unet; both with --table
    python notebooks/figures/explanations.py [--folder FOLDER --models scenes-dit scenes-unet --only
    additivity faithfulness statements]

Additivity: values and base against the predictions of 1,000 drawn plans. Faithfulness: from uniform
    `--start`, layers are raised to full precision one
by one in the order of an explanation, and the noise of the denoiser's output is measured after
every step; the area under the curve of the share of the noise that is gone, against the best order
found, weight error and chance. Statements: each with a 95% bootstrap interval, and holds, does not,
or can't tell. Orders that were measured are kept in FOLDER/MODEL/faithfulness.json. Writes
explanations.json; parts that are left out keep what an earlier run found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from figure import publish
from measured_plans import FOLDER, SCHEMES
from surrogates import study_in

from qsearch import zoo
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.table import SensitivityTable
from qsearch.decide.draws import draw
from qsearch.learn.explaining import explain_surrogate
from qsearch.learn.fitting import Study, fit
from qsearch.learn.shapley import explain_quadratic
from qsearch.measure.noise import relative_noise
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    load_pipeline,
    record,
    run,
    scene_prompts,
)
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate

TRANSFORMER = ("self-attention", "cross-attention", "feed-forward")


def additivity(studies: dict[str, Study], count: int) -> list[dict[str, Any]]:
    """Largest miss of the sum of values and base, over the range of the predictions."""
    rows = []
    for name, study in studies.items():
        plans = draw(study.graph, SCHEMES, count, seed=77)
        for kind in ("ridge", "xgboost"):
            for metric in ("sqnr", "alignment"):
                made = fit(study.graph, study.trials, study.tables, metric=metric, kind=kind)
                sums = explain_surrogate(made, study.graph, plans, study.tables).sums()
                rows.append({"model": name, "explainer": f"{kind}, {metric}", **miss(sums)})
                print(rows[-1], flush=True)
        names = list(plans)
        parts = [
            {n: plans[n] for n in names[i : i + 50]} for i in range(0, count, 50)
        ]  # 87 layers x steps x 1,000 plans at once would be a million rows
        sums = pd.concat(
            [
                explain_quadratic(
                    study.graph, study.tables[0], part, metrics=["sqnr"], trust=1.0
                ).sums()
                for part in parts
            ]
        )
        rows.append({"model": name, "explainer": "quadratic model, sqnr", **miss(sums)})
    return rows


def miss(sums: Any) -> dict[str, Any]:
    """How far values and base are from the prediction, at most."""
    spread = float(sums["prediction"].max() - sums["prediction"].min())
    return {
        "plans": len(sums),
        "largest miss / range": float(
            (sums["value"] + sums["base"] - sums["prediction"]).abs().max()
        )
        / spread,
        "range": spread,
    }


def faithfulness(name: str, folder: Path, start: str, seed: int = 0) -> list[dict[str, Any]]:
    """The area of each order of raising layers, measured after every layer."""
    kept_in = folder / name / "faithfulness.json"
    curves: dict[str, list[float]] = json.loads(kept_in.read_text()) if kept_in.is_file() else {}
    pipe = load_pipeline(zoo.folder(name))
    model, graph = denoiser_of(pipe), OpGraph.load(folder / name / "graph.json")
    calls = record(pipe, scene_prompts(4, 900), Sampling(6, seed=900), bins=2)
    step_table = SensitivityTable.load(folder / name / "step.parquet", graph.id)
    plan = Plan.uniform(graph, start)
    weights, names = QuantizedWeights(model, graph), [layer.name for layer in graph.quantizable]
    reference = [run(model, call) for call in calls]

    def measured(kept: set[str]) -> float:
        layers = {n: KEEP if n in kept else Scheme.parse(start) for n in names}
        with simulate(model, layers, graph, weights):
            return sum(
                relative_noise(run(model, c), r)[0] for c, r in zip(calls, reference, strict=True)
            ) / len(calls)

    values, full = (
        explain_quadratic(graph, step_table, {"p": plan}, metrics=["noise"], trust=trust).totals(
            plan="p", method="shapley", kind="layer", metric="noise"
        )
        for trust in (None, 1.0)
    )
    own = {n: step_table.values("noise")[n][start] for n in names}
    weight = profile(model, graph, [start], [], estimator="weight_error")
    if "alone" not in curves:
        curves["alone"] = [measured({n}) for n in names]
        kept_in.write_text(json.dumps(curves))
    swept = dict(zip(names, curves["alone"], strict=True))
    orders = {
        "exact Shapley values": sorted(names, key=lambda n: -values[n]),
        "Shapley values, products in full": sorted(names, key=lambda n: -full[n]),
        "own noise by probes": sorted(names, key=lambda n: -own[n]),
        "greedy on the quadratic model": greedy(step_table, start, names),
        "noise removed by each alone, measured": sorted(names, key=lambda n: swept[n]),
        "weight error": by_table(weight, "weight_error", start),
        "relative weight error": by_table(weight, "relative_weight_error", start),
    }
    dice = np.random.default_rng(seed)
    orders |= {f"random {i}": list(dice.permutation(names)) for i in range(3)}
    rows: list[dict[str, Any]] = []
    for label, order in orders.items():
        if label not in curves:
            curves[label] = [measured(set(order[:k])) for k in range(len(order) + 1)]
            kept_in.write_text(json.dumps(curves))
        gone = 1 - np.array(curves[label]) / curves[label][0]
        area = float(np.trapezoid(np.clip(gone, -1, 1), dx=1 / len(order)))
        half = int(np.argmax(gone >= 0.5))
        rows.append({"model": name, "order": label, "area": area, "layers for half": half})
        print(rows[-1], flush=True)
    best = max(row["area"] for row in rows)
    return [row | {"of the best": row["area"] / best} for row in rows]


def by_table(table: SensitivityTable, metric: str, scheme: str) -> list[str]:
    """Layers, the largest first."""
    values = table.values(metric)
    return sorted(values, key=lambda n: -values[n][scheme])


def greedy(table: SensitivityTable, scheme: str, names: list[str]) -> list[str]:
    """The layer whose raising lowers the predicted noise most, again and again."""
    assert table.responses is not None
    place = {choice: i for i, choice in enumerate(table.responses.choices)}
    parts = []
    for cell, values in table.responses.values.items():
        found = values[[place[n, scheme] for n in names]].astype(np.float64).sum(1)
        parts.append(
            (found / np.sqrt(found.shape[1] * table.responses.power[cell].sum())).reshape(
                len(names), -1
            )
        )
    scores = np.concatenate(parts, 1)
    left, total, order = list(range(len(names))), scores.sum(0), []
    while left:
        best = min(left, key=lambda i: float(((total - scores[i]) ** 2).sum()))
        order.append(names[best])
        left.remove(best)
        total = total - scores[best]
    return order


def _more_of(slope: Callable[[np.ndarray], Any], sign: int, rows: np.ndarray) -> float:
    """What 10 % more layers give, by the second slope."""
    return sign * 0.1 * float(slope(rows)[1])


def _gap(slope: Callable[[np.ndarray], Any], rows: np.ndarray) -> float:
    """How much more the second slope is than the first."""
    found = slope(rows)
    return float(found[1] - found[0])


def interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, seed: int = 0
) -> tuple[float, float, float]:
    """(statistic, 2.5% and 97.5% of it over 2,000 samples of the rows with replacement)."""
    dice = np.random.default_rng(seed)
    found = [statistic(values[dice.integers(len(values), size=len(values))]) for _ in range(2000)]
    return (
        float(statistic(values)),
        float(np.quantile(found, 0.025)),
        float(np.quantile(found, 0.975)),
    )


def verdict(
    said: str, where: str, what: str, unit: str, found: tuple[float, float, float]
) -> dict[str, Any]:
    """A row; the statement is put so that it holds where the number is above zero."""
    value, low, high = found
    word = "holds" if low > 0 else "does not" if high < 0 else "can't tell"
    return {
        "statement": said,
        "model": where,
        "number": what,
        "unit": unit,
        "value": value,
        "low": low,
        "high": high,
        "verdict": word,
    }


def loudness(study: Study, scheme: str) -> dict[str, float]:
    """Layer -> log10 of what the choice adds to the error of the final latent, by the probes
    through the sampler; without layers whose few weights a codebook holds.
    """
    return {
        site: float(np.log10(row[scheme]))
        for site, row in study.tables[0].values("sqnr").items()
        if row[scheme] > 0
    }


def slopes(study: Study, columns: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of plans -> least-squares slopes of the measured SQNR in dB on the columns."""
    design = np.column_stack([np.ones(len(study.trials)), *columns.values()])
    target = study.target("sqnr")

    def of(rows: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.lstsq(design[rows], target[rows], rcond=None)[0][1:])

    return of


def statements(studies: dict[str, Study]) -> list[dict[str, Any]]:
    """Qua²SeDiMo's statements, each by what was measured of whole plans, or by the probes through
    the sampler.
    """
    rows: list[dict[str, Any]] = []
    for name, study in studies.items():
        graph, count = study.graph, len(study.trials)
        layers = graph.quantizable
        sign, said = (
            (1, "DiTs prefer k-means") if name == "scenes-dit" else (-1, "U-Nets prefer uniform")
        )
        choices = [[t.choices[x.name][0] for x in layers] for t in study.trials]
        mean = {"bits": np.array([np.mean([s.bits for s in row]) for row in choices])}
        mean |= {
            f: np.array([np.mean([s.family == f for s in row]) for row in choices])
            for f in ("codebook", "int", "float")
        }
        of = slopes(study, mean)
        found = interval(np.arange(count), partial(_more_of, of, sign))
        rows.append(
            verdict(
                said,
                name,
                "measured plans: 10% more layers on k-means instead of uniform, same bits",
                "dB of SQNR",
                found,
            )
        )
        for bits in (2, 3, 4):
            km, uniform = loudness(study, f"km{bits}-c"), loudness(study, f"uint{bits}-c")
            found = interval(
                np.array([sign * 10 * (uniform[n] - km[n]) for n in km if n in uniform])
            )
            rows.append(
                verdict(said, name, f"probes, layer by layer: {bits} bits", "dB of noise", found)
            )
        loud = loudness(study, "uint3-c")
        order = sorted(loud.values())
        place = {n: float(np.searchsorted(order, v) / (len(order) - 1)) for n, v in loud.items()}
        home = {n: block.kind for block in graph.blocks for n in block.layers}
        if "resnet" in home.values():
            resnet, other = (
                [loud[x.name] for x in layers if home.get(x.name) in kinds]
                for kinds in (("resnet",), TRANSFORMER)
            )
            rows.append(
                verdict(
                    "ResNet blocks more sensitive than transformer blocks",
                    name,
                    "probes, layers' noise",
                    "dB",
                    difference(resnet, other),
                )
            )
            sizes = {x.name: np.log10(x.weights) for x in layers}
            resnet, other = (
                [loud[x.name] - sizes[x.name] for x in layers if home.get(x.name) in kinds]
                for kinds in (("resnet",), TRANSFORMER)
            )
            rows.append(
                verdict(
                    "ResNet blocks more sensitive than transformer blocks",
                    name,
                    "probes, noise a weight",
                    "dB",
                    difference(resnet, other),
                )
            )
            lost = {
                k: np.array(
                    [
                        -np.mean(
                            [row[i].bits for i, x in enumerate(layers) if home.get(x.name) in kinds]
                        )
                        for row in choices
                    ]
                )
                for k, kinds in (("resnet", ("resnet",)), ("transformer", TRANSFORMER))
            }
            lost["rest"] = np.array(
                [
                    -np.mean(
                        [
                            row[i].bits
                            for i, x in enumerate(layers)
                            if home.get(x.name) not in (*TRANSFORMER, "resnet")
                        ]
                    )
                    for row in choices
                ]
            )
            of_lost = slopes(study, lost)
            found = interval(np.arange(count), partial(_gap, of_lost))
            rows.append(
                verdict(
                    "ResNet blocks more sensitive than transformer blocks",
                    name,
                    "measured plans: a bit less in all of them",
                    "dB of SQNR lost more",
                    found,
                )
            )
        times = np.array([place[x.name] for x in layers if x.role == "time-embedding"])
        rows.append(
            verdict(
                "time embedding sensitive everywhere",
                name,
                "its layers' mean place among all, above the middle",
                "share of layers",
                spread(study, times, place),
            )
        )
        for side in ("self", "cross"):
            pairs = [
                (b.name, {layer.role: layer.name for layer in layers if layer.name in b.layers})
                for b in graph.blocks
                if b.kind == f"{side}-attention"
            ]
            gaps = [
                10 * (loud[r[f"{side}-attention-k"]] - loud[r[f"{side}-attention-q"]])
                for _, r in pairs
            ]
            rows.append(
                verdict(
                    f"query easier than key ({side})",
                    name,
                    "probes, key above query in the same block",
                    "dB",
                    interval(np.array(gaps)),
                )
            )
    if len(studies) == 2:
        rows.append(output_layers(studies))
    return rows


def difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """10 x (mean of a - mean of b), and its interval over both."""
    dice = np.random.default_rng(0)
    x, y = np.array(a), np.array(b)
    found = [
        x[dice.integers(len(x), size=len(x))].mean() - y[dice.integers(len(y), size=len(y))].mean()
        for _ in range(2000)
    ]
    return (
        10 * float(x.mean() - y.mean()),
        10 * float(np.quantile(found, 0.025)),
        10 * float(np.quantile(found, 0.975)),
    )


def places(study: Study, role: str, draws: int = 2000) -> np.ndarray:
    """Mean place (0 = the quietest of all layers, 1 = the loudest) of a role's layers at uint3-c,
    over draws of all layers' noise within the probes' errors.
    """
    frame = study.tables[0].frame
    frame = frame[(frame["metric"] == "sqnr") & (frame["scheme"] == "uint3-c")]
    dice, which = (
        np.random.default_rng(0),
        np.array([study.graph.layer(n).role == role for n in frame["site"]]),
    )
    relative = np.minimum(frame["error"].to_numpy() / frame["estimate"].to_numpy(), 1.0)
    drawn = np.log(frame["estimate"].to_numpy()) + relative * dice.normal(size=(draws, len(frame)))
    ranks = drawn.argsort(1).argsort(1) / (len(frame) - 1)
    return np.asarray(ranks[:, which].mean(1))


def spread(study: Study, times: np.ndarray, place: dict[str, float]) -> tuple[float, float, float]:
    """How far above the middle the time embedding's layers stand, with the probes' errors."""
    drawn = places(study, "time-embedding") - 0.5
    return (
        float(times.mean() - 0.5),
        float(np.quantile(drawn, 0.025)),
        float(np.quantile(drawn, 0.975)),
    )


def output_layers(studies: dict[str, Study]) -> dict[str, Any]:
    """Whether the output layer's place among all layers is higher in the DiT."""
    dit, unet = (places(studies[name], "output") for name in zoo.NAMES)
    gap = dit - unet
    what = (
        f"its place among all layers, {np.median(dit):.2f} in the DiT, {np.median(unet):.2f} in "
        "the U-Net"
    )
    return verdict(
        "output layer more sensitive in DiTs",
        "both",
        what,
        "share of layers",
        (float(np.median(gap)), float(np.quantile(gap, 0.025)), float(np.quantile(gap, 0.975))),
    )


def main() -> None:
    """All three parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="*", default=["additivity", "faithfulness", "statements"])
    parser.add_argument("--models", nargs="*", default=zoo.NAMES)
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--start", default="uint3-c")
    o = parser.parse_args()
    torch.set_num_threads(1)
    studies = (
        {} if o.only == ["faithfulness"] else {name: study_in(o.folder / name) for name in o.models}
    )
    out = Path(__file__).with_suffix(".json")
    found: dict[str, Any] = json.loads(out.read_text()).get("parts", {}) if out.is_file() else {}
    if "additivity" in o.only:
        found["additivity"] = additivity(studies, o.plans)
    if "faithfulness" in o.only:
        found["faithfulness"] = [
            row for name in o.models for row in faithfulness(name, o.folder, o.start)
        ]
    if "statements" in o.only:
        found["statements"] = statements(studies)
    for part, rows in found.items():
        publish(__file__, rows, title=part, seed=0, extra={"parts": found})


if __name__ == "__main__":
    main()
