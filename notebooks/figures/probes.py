"""Do probes find what the one-at-a-time sweep measures, and what do they predict of whole plans? On
a denoiser of the zoo, beside the baselines.

    python notebooks/figures/probes.py scenes-dit [--bins 5 --samples 8 --probes 24 --plans 200
        --layers 0 --steps 10 --batch 8 --schemes uint2-c,uint4-c --metrics sqnr,alignment]
        [--trajectory] [--name activations] [--keep FOLDER]

For each scheme and step bin: Spearman with the sweep over layers, median ratio of magnitudes, and
how often the sweep's value lies within one and two stated standard errors (of the probes alone:
both look at the same samples; of logarithms). Then random mixed plans: Spearman and median ratio
between the measured error and what each table predicts. Then what fewer probes would have given.
Writes probes-MODEL.json (with --trajectory, probes-MODEL-trajectory.json) beside this file.
`--layers N` takes every n-th layer so that N are left, for a quick look. `--name` is added to the
JSON's name; measurements are kept in the folder of `--keep`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figure import publish
from numpy.typing import NDArray
from scipy.stats import spearmanr
from worlds import MODELS, prompts_of, sampling_of

from qsearch import zoo
from qsearch.core.artifacts import digest
from qsearch.core.probe_responses import ProbeResponses
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure.noise import ratio
from qsearch.measure.observation import observations
from qsearch.measure.pipelines import (
    decode_batch,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
)
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from qsearch.measure.trajectory import trajectories

#: sampler steps of a call whose shapes alone are read: one a stage of scenes-ecar
FEWEST = 3
ESTIMATORS = ("probe", "sweep", "fisher", "weight_error")
SCHEMES = ("uint2-c", "uint3-c", "uint4-c", "uint4-g32", "int4-c", "uint5-c", "uint6-c", "uint8-c")


def compared(probe: SensitivityTable, sweep: SensitivityTable) -> list[dict[str, Any]]:
    """A row a metric, scheme and step bin."""
    shares = probe.responses
    assert shares is not None
    place = {choice: i for i, choice in enumerate(shares.choices)}
    both = probe.frame.merge(
        sweep.frame, on=["site", "scheme", "step", "metric"], suffixes=("", "_sweep")
    )
    both = both[
        both["estimate_sweep"] > 0
    ].copy()  # a channel of one weight is exact, and nothing to compare
    both["own"] = [
        shares.probe_error((r["metric"], r["step"]), [place[r["site"], r["scheme"]]])
        for r in both.to_dict("records")
    ]
    rows = []
    for (metric, scheme, step), cell in both.groupby(["metric", "scheme", "step"]):
        off = np.abs(np.log(cell["estimate"] / cell["estimate_sweep"])) / (
            cell["own"] / cell["estimate"]
        )
        rows.append(
            {
                "metric": metric,
                "scheme": scheme,
                "step": int(str(step)),
                "Spearman": float(spearmanr(cell["estimate"], cell["estimate_sweep"]).statistic),
                "median ratio": float((cell["estimate"] / cell["estimate_sweep"]).median()),
                "stated error": float((cell["own"] / cell["estimate"]).median()),
                "within 1 error": float((off < 1).mean()),
                "within 2": float((off < 2).mean()),
            }
        )
    return rows


def fewer(
    probe: SensitivityTable, sweep: SensitivityTable, metric: str, counts: list[int]
) -> list[dict[str, Any]]:
    """What the first probes alone would have found: error bar and Spearman by their number."""
    shares = probe.responses
    assert shares is not None
    truth = {
        (r["site"], r["scheme"], r["step"]): r["estimate"]
        for r in sweep.frame[sweep.frame["metric"] == metric].to_dict("records")
        if r["estimate"] > 0
    }
    rows = []
    for count in counts:
        part = ProbeResponses(
            shares.choices, {c: v[:, :, :count] for c, v in shares.values.items()}, shares.power
        )
        found, own = [], []
        for (name, step), _ in part.values.items():
            for i, (site, scheme) in enumerate(shares.choices):
                if name == metric and (site, scheme, step) in truth:
                    value = part.error((name, step), [i])[0]
                    found.append((value, truth[site, scheme, step], scheme, step))
                    own.append(part.probe_error((name, step), [i]) / value)
        cells = {key: [f[:2] for f in found if f[2:] == key] for key in {f[2:] for f in found}}
        worst = min(
            float(spearmanr([f[0] for f in cell], [f[1] for f in cell]).statistic)
            for cell in cells.values()
        )
        rows.append(
            {
                "metric": metric,
                "probes": count,
                "stated error": float(np.median(own)),
                "worst Spearman of a cell": worst,
            }
        )
    return rows


def kept(o: argparse.Namespace, what: str) -> Path:
    """Where an estimator's table of this question lies (`.seconds` beside it when it is whole), or
    the measured errors of plans.
    """
    asked = [
        o.model,
        o.bins,
        o.samples,
        o.batch,
        o.steps,
        o.layers,
        o.seed,
        o.schemes,
        o.metrics,
        o.trajectory,
    ]
    by_bin = what == "plans by bin"
    name = digest([*asked, *([] if by_bin else [o.probes]), what])
    made: Path = o.keep / f"{name}.{'txt' if by_bin else 'parquet'}"
    return made


def plans_of(o: argparse.Namespace, layers: list[str], count: int) -> list[dict[str, Scheme]]:
    """Random mixed plans of very different sizes, not all around the mean."""
    dice = np.random.default_rng(o.seed)
    options = [Scheme.parse(s) for s in o.schemes if s != "uint2-c"] or [
        Scheme.parse(s) for s in o.schemes
    ]
    plans = []
    for _ in range(count):
        odds = dice.dirichlet(np.full(len(options), 0.7))
        plans.append({layer: options[dice.choice(len(options), p=odds)] for layer in layers})
    return plans


def measure(o: argparse.Namespace) -> None:
    """Every table, and the errors of plans in each step bin, in the folder of kept files; what lies
    there is not measured again.
    """
    pipe = load_pipeline(zoo.folder(o.model), o.device)
    model, sampling, prompts = (
        denoiser_of(pipe),
        sampling_of(o.model, o.steps, seed=o.seed),
        prompts_of(o.model, o.samples, o.seed),
    )
    o.keep.mkdir(parents=True, exist_ok=True)
    call, *_ = record(pipe, prompts[:1], sampling_of(o.model, FEWEST), bins=1)
    graph = extract(model, example_inputs(call, model), name=o.model)
    if o.layers:
        every = max(1, len(graph.quantizable) // o.layers)
        some = {layer.name for layer in graph.quantizable[::every]}
        graph = replace(
            graph, layers=tuple(replace(x, quantizable=x.name in some) for x in graph.layers)
        )
    calls: Any = (
        trajectories(pipe, prompts, sampling, o.batch)
        if o.trajectory
        else record(pipe, prompts, sampling, o.bins, o.batch)
    )
    for estimator in ESTIMATORS:
        path = kept(o, estimator)
        if path.with_suffix(".seconds").exists() or (
            estimator in ESTIMATORS[2:] and (o.trajectory or not o.plans)
        ):
            continue  # baselines are for plans; Fisher's steps would be added as if independent
        began = time.process_time()
        settings = {
            "metrics": o.metrics,
            "probes": o.probes,
            "pipe": pipe,
            "sampling": sampling,
            "seed": o.seed,
            "say": print,
        }
        profile(
            model,
            graph,
            o.schemes,
            calls,
            estimator=estimator,
            partial=path,
            key=path.stem,
            **settings,
        ).save(path, key=path.stem, seed=o.seed)
        path.with_suffix(".seconds").write_text(f"{time.process_time() - began:.1f}")
    first = o.metrics[:1]
    parts = (
        [c.observed(model, first) for c in calls]
        if o.trajectory
        else observations(model, calls, first, partial(decode_batch, pipe, sampling=sampling))
    )
    path, weights = kept(o, "plans by bin"), QuantizedWeights(model, graph)
    done = len(path.read_text().splitlines()) if path.exists() else 0
    bins = sorted({part.bin for part in parts})
    for part in parts:
        _ = part.reference
    for plan in plans_of(o, [layer.name for layer in graph.quantizable], o.plans)[done:]:
        values = []
        with simulate(model, plan, graph, weights):
            for b in bins:
                mine = [part for part in parts if part.bin == b]
                errors = [
                    (part.features()[first[0]] - part.reference[first[0]]).double().square().sum(1)
                    for part in mine
                ]
                values.append(
                    ratio(torch.cat(errors), torch.cat([part.scale[first[0]] for part in mine]))[0]
                )
        with path.open("a") as file:
            file.write(" ".join(repr(float(v)) for v in values) + "\n")


def predicted(
    o: argparse.Namespace, tables: dict[str, SensitivityTable], truth: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """How well each table, and each plan's mean bits a code, tell the measured errors [plans,
    bins]: of the mean over bins, and in the worst bin.
    """
    first = o.metrics[0]
    assert tables["probe"].responses is not None
    plans = plans_of(
        o, list(dict.fromkeys(site for site, _ in tables["probe"].responses.choices)), len(truth)
    )
    bins = sorted(set(tables["probe"].frame["step"]))
    asked: dict[str, tuple[str, str, bool]] = {
        "probes, with interactions": ("probe", first, True),
        "probes, summed": ("probe", first, False),
        "sweep, summed": ("sweep", first, False),
        "fisher, summed": ("fisher", first, False),
        "weight error, summed": ("weight_error", "weight_error", False),
        "relative weight error, summed": ("weight_error", "relative_weight_error", False),
    }
    guesses = {
        "- mean bits": np.array(
            [[-float(np.mean([s.bits for s in p.values()]))] * len(bins) for p in plans]
        )
    }
    for name, (table, metric, interactions) in asked.items():
        if table in tables:
            every = [
                [b] if b in set(tables[table].frame["step"]) else None for b in bins
            ]  # what the weights alone tell is the same in every bin
            guesses[name] = np.array(
                [
                    [
                        tables[table].predict(p, metric, b, interactions=interactions)[0]
                        for b in every
                    ]
                    for p in plans
                ]
            )
    return [
        {
            "predictor": name,
            "Spearman": float(spearmanr(values.mean(1), truth.mean(1)).statistic),
            "worst bin": min(
                float(spearmanr(values[:, i], truth[:, i]).statistic) for i in range(len(bins))
            ),
            "median of predicted / measured": float(np.median(values / truth))
            if "weight" not in name and "bits" not in name
            else "-",
        }
        for name, values in guesses.items()
    ]


def main() -> None:
    """Measure, compare, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    for name, value in {
        "bins": 5,
        "samples": 8,
        "batch": 2,
        "steps": 20,
        "probes": 24,
        "plans": 200,
        "layers": 0,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--metrics", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trajectory", action="store_true")
    parser.add_argument("--name", default="", help="added to the name of the JSON")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("runs/probes"),
        help="folder of finished and unfinished tables, from which a stopped run goes on",
    )
    parser.add_argument(
        "--so-far", action="store_true", help="measure nothing, publish what a stopped run has left"
    )
    o = parser.parse_args()
    o.schemes = o.schemes.split(",")
    o.metrics = (
        o.metrics.split(",") if o.metrics else ["sqnr", "alignment"] if o.trajectory else ["noise"]
    )
    if not o.so_far:
        measure(o)
    tables = {e: SensitivityTable.load(kept(o, e)) for e in ESTIMATORS if kept(o, e).exists()}
    seconds = {
        e: float(kept(o, e).with_suffix(".seconds").read_text())
        for e in tables
        if kept(o, e).with_suffix(".seconds").exists()
    }
    lines = (
        kept(o, "plans by bin").read_text().splitlines()[: o.plans]
        if kept(o, "plans by bin").exists()
        else []
    )
    truth = np.array([[float(v) for v in line.split()] for line in lines])
    cells = compared(tables["probe"], tables["sweep"])
    counts = [n for n in (2, 4, 8, 16, 24, 32, 64, 128) if n <= o.probes]
    curve = fewer(tables["probe"], tables["sweep"], o.metrics[0], counts)
    both = tables["probe"].frame.merge(
        tables["sweep"].frame, on=["site", "scheme", "step", "metric"], suffixes=("", "_sweep")
    )
    overall = [
        {
            "metric": metric,
            "layers": int(rows["site"].nunique()),
            "Spearman, all cells": float(
                spearmanr(rows["estimate"], rows["estimate_sweep"]).statistic
            ),
            "worst cell": min(c["Spearman"] for c in cells if c["metric"] == metric),
            "median ratio": float((rows["estimate"] / rows["estimate_sweep"]).median()),
            "within 1 error": float(
                np.mean([c["within 1 error"] for c in cells if c["metric"] == metric])
            ),
            "within 2": float(np.mean([c["within 2"] for c in cells if c["metric"] == metric])),
        }
        for metric, rows in both[both["estimate_sweep"] > 0].groupby("metric")
    ]
    out = str(
        Path(__file__).with_name(
            f"probes-{o.model}{'-trajectory' if o.trajectory else ''}"
            f"{'-' * bool(o.name)}{o.name}.py"
        )
    )
    shown: dict[str, Any] = {
        "overall": overall,
        "cells": cells,
        "probes needed": curve,
        "CPU seconds": seconds,
        "plans": len(truth),
    }
    if len(truth):
        shown["predicted"] = predicted(o, tables, truth)
        shown["measured errors of the plans"] = [
            float(v) for v in np.quantile(truth.mean(1), [0, 0.5, 1])
        ]
        publish(
            out,
            shown["predicted"],
            title=f"{o.model}: error of {len(truth)} random mixed plans, {o.metrics[0]}",
            seed=o.seed,
        )
    publish(out, curve, title=f"{o.model}: how many probes", seed=o.seed)
    publish(out, cells, title=f"{o.model}: probes against the sweep", seed=o.seed)
    publish(out, overall, title=f"{o.model}: all; CPU seconds {seconds}", seed=o.seed, extra=shown)


if __name__ == "__main__":
    main()
