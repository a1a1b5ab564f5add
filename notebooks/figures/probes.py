"""Do probes find what the one-at-a-time sweep measures, and what do they predict of whole plans? On a denoiser of the zoo, beside the baselines.

    python notebooks/figures/probes.py scenes-dit [--bins 5 --samples 8 --probes 24 --plans 200 --layers 0]

For each scheme and step bin: Spearman with the sweep over layers, median ratio of magnitudes, and how often the sweep's value lies within one and
two stated standard errors (of the probes alone: both look at the same samples). Then random mixed plans: Spearman and median ratio between the
measured error and what each table predicts. Then what fewer probes would have given. Writes probes-MODEL.json (with --trajectory,
probes-MODEL-trajectory.json) beside this file. `--layers N` takes every n-th layer so that N are left, for a quick look.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from figure import publish
from scipy.stats import spearmanr

from qsearch import zoo
from qsearch.core.artifacts import digest
from qsearch.core.graph import OpGraph
from qsearch.core.plan import BitPlan
from qsearch.core.scheme import Scheme
from qsearch.core.shares import Shares
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure.noise import ratio
from qsearch.measure.observation import observations
from qsearch.measure.pipelines import Sampling, decode_batch, denoiser_of, example_inputs, load_pipeline, record, scene_prompts
from qsearch.measure.profiling import profile
from qsearch.measure.simulation import QuantizedWeights, simulate
from qsearch.measure.trajectory import trajectories

SCHEMES = ("uint2-c", "uint3-c", "uint4-c", "uint4-g32", "int4-c", "uint5-c", "uint6-c", "uint8-c")


def compared(probe: SensitivityTable, sweep: SensitivityTable) -> list[dict[str, Any]]:
    """A row a metric, scheme and step bin."""
    shares = probe.shares
    assert shares is not None
    place = {choice: i for i, choice in enumerate(shares.choices)}
    both = probe.frame.merge(sweep.frame, on=["site", "scheme", "step", "metric"], suffixes=("", "_sweep"))
    both["own"] = [shares.probe_error((r["metric"], r["step"]), [place[r["site"], r["scheme"]]]) for r in both.to_dict("records")]
    rows = []
    for (metric, scheme, step), cell in both.groupby(["metric", "scheme", "step"]):
        off = np.log(cell["estimate"] / cell["estimate_sweep"]).abs() / (cell["own"] / cell["estimate"])
        rows.append(
            {
                "metric": metric,
                "scheme": scheme,
                "step": int(step),
                "Spearman": float(spearmanr(cell["estimate"], cell["estimate_sweep"]).statistic),
                "median ratio": float((cell["estimate"] / cell["estimate_sweep"]).median()),
                "stated error": float((cell["own"] / cell["estimate"]).median()),
                "within 1 error": float((off < 1).mean()),
                "within 2": float((off < 2).mean()),
            }
        )
    return rows


def fewer(probe: SensitivityTable, sweep: SensitivityTable, metric: str, counts: list[int]) -> list[dict[str, Any]]:
    """What the first probes alone would have found: error bar and Spearman by their number."""
    shares = probe.shares
    assert shares is not None
    truth = {(r["site"], r["scheme"], r["step"]): r["estimate"] for r in sweep.frame[sweep.frame["metric"] == metric].to_dict("records")}
    rows = []
    for count in counts:
        part = Shares(shares.choices, {c: v[:, :, :count] for c, v in shares.values.items()}, shares.power)
        found, own = [], []
        for (name, step), _ in part.values.items():
            for i, (site, scheme) in enumerate(shares.choices):
                if name == metric:
                    value = part.error((name, step), [i])[0]
                    found.append((value, truth[site, scheme, step], scheme, step))
                    own.append(part.probe_error((name, step), [i]) / value)
        cells = {key: [f[:2] for f in found if f[2:] == key] for key in {f[2:] for f in found}}
        worst = min(float(spearmanr(*zip(*cell, strict=True)).statistic) for cell in cells.values())
        rows.append({"metric": metric, "probes": count, "stated error": float(np.median(own)), "worst Spearman of a cell": worst})
    return rows


def measured(model: Any, graph: OpGraph, parts: list[Any], plans: list[dict[str, Scheme]], metric: str, kept: Path) -> list[float]:
    """The error of each plan, averaged over step bins; those in the file `kept`, a line each, are not measured again."""
    import torch

    weights = QuantizedWeights(model, graph)
    bins = sorted({part.bin for part in parts})
    for part in parts:
        _ = part.reference
    found = [float(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for plan in plans[len(found) :]:
        values = []
        with simulate(model, plan, graph, weights):
            for b in bins:
                mine = [part for part in parts if part.bin == b]
                errors = [(part.features()[metric] - part.reference[metric]).double().square().sum(1) for part in mine]
                values.append(ratio(torch.cat(errors), torch.cat([part.scale[metric] for part in mine]))[0])
        found.append(float(np.mean(values)))
        with kept.open("a") as file:
            file.write(f"{found[-1]!r}\n")
    return found[: len(plans)]


def main() -> None:
    """Measure, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=zoo.NAMES)
    for name, value in {"bins": 5, "samples": 8, "batch": 2, "steps": 20, "probes": 24, "plans": 200, "layers": 0, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--metrics", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trajectory", action="store_true")
    parser.add_argument("--name", default="", help="added to the name of the JSON")
    parser.add_argument("--keep", type=Path, default=Path("runs/probes"), help="folder of finished and unfinished tables, from which a stopped run goes on")
    o = parser.parse_args()
    names = o.metrics.split(",") if o.metrics else ["sqnr", "alignment"] if o.trajectory else ["noise"]
    pipe = load_pipeline(zoo.folder(o.model), o.device)
    model, sampling, prompts = denoiser_of(pipe), Sampling(o.steps, seed=o.seed), scene_prompts(o.samples, o.seed)
    o.keep.mkdir(parents=True, exist_ok=True)
    (call,) = record(pipe, prompts[:1], Sampling(2), bins=1)
    graph = extract(model, example_inputs(call, model), name=o.model)
    if o.layers:
        every = max(1, len(graph.quantizable) // o.layers)
        kept = {layer.name for layer in graph.quantizable[::every]}
        graph = replace(graph, layers=tuple(replace(x, quantizable=x.name in kept) for x in graph.layers))
    calls: Any = trajectories(pipe, prompts, sampling, o.batch) if o.trajectory else record(pipe, prompts, sampling, o.bins, o.batch)
    schemes = o.schemes.split(",")

    tables, seconds = {}, {}
    for estimator in ("probe", "sweep", "fisher", "weight_error"):
        if estimator in ("fisher", "weight_error") and (o.trajectory or not o.plans):
            continue  # baselines for plans; Fisher's steps would be added as if independent
        began = time.process_time()
        settings = {"metrics": names, "probes": o.probes, "pipe": pipe, "seed": o.seed, "say": print}
        key = digest([o.model, o.bins, o.samples, o.batch, o.steps, o.probes, o.layers, o.seed, schemes, names, o.trajectory, estimator])
        kept = o.keep / f"{key}.parquet"
        if kept.with_suffix(".seconds").exists():
            tables[estimator], seconds[estimator] = SensitivityTable.load(kept, graph.id), float(kept.with_suffix(".seconds").read_text())
            continue
        tables[estimator] = profile(model, graph, schemes, calls, estimator=estimator, partial=kept, key=key, **settings)
        tables[estimator].save(kept, key=key, seed=o.seed)
        seconds[estimator] = round(time.process_time() - began, 1)
        kept.with_suffix(".seconds").write_text(str(seconds[estimator]))
    cells = compared(tables["probe"], tables["sweep"])

    dice = np.random.default_rng(o.seed)
    options = [Scheme.parse(s) for s in schemes if s != "uint2-c"] or [Scheme.parse(s) for s in schemes]
    plans = []
    for _ in range(o.plans):
        odds = dice.dirichlet(np.full(len(options), 0.7))  # plans of very different sizes, not all around the mean
        plans.append({layer.name: options[dice.choice(len(options), p=odds)] for layer in graph.quantizable})
    parts = [c.observed(model, names[:1]) for c in calls] if o.trajectory else observations(model, calls, names[:1], partial(decode_batch, pipe))
    key = digest([o.model, o.bins, o.samples, o.batch, o.steps, o.layers, o.seed, schemes, names[0], o.trajectory])
    truth = measured(model, graph, parts, plans, names[0], o.keep / f"{key}.txt")
    guesses: dict[str, list[float]] = {
        "probes, with interactions": [tables["probe"].predict(p, names[0])[0] for p in plans],
        "probes, summed": [tables["probe"].predict(p, names[0], interactions=False)[0] for p in plans],
        "sweep, summed": [tables["sweep"].predict(p, names[0], interactions=False)[0] for p in plans],
        "- average bits": [-BitPlan.make(graph, {x.name: p.get(x.name, "keep") for x in graph}).achieved.average_bits for p in plans],
    }
    baselines = {"fisher": ("fisher", names[0]), "weight error": ("weight_error",) * 2, "relative weight error": ("weight_error", "relative_weight_error")}
    for name, (table, metric) in baselines.items():
        if table in tables:
            guesses[f"{name}, summed"] = [tables[table].predict(p, metric, interactions=False)[0] for p in plans]
    predicted = [
        {
            "predictor": name,
            "Spearman": float(spearmanr(values, truth).statistic),
            "median of predicted / measured": float(np.median(np.divide(values, truth))) if "weight" not in name and "bits" not in name else "-",
        }
        for name, values in guesses.items()
        if plans
    ]
    counts = [n for n in (2, 4, 8, 16, 24, 32, 64, 128) if n <= o.probes]
    curve = fewer(tables["probe"], tables["sweep"], names[0], counts)

    out = str(Path(__file__).with_name(f"probes-{o.model}{'-trajectory' if o.trajectory else ''}{'-' * bool(o.name)}{o.name}.py"))
    shown = {"cells": cells, "predicted": predicted, "probes needed": curve, "seconds": seconds, "plans": len(plans), "layers": len(graph.quantizable)}
    if plans:
        shown["measured errors of the plans"] = [min(truth), float(np.median(truth)), max(truth)]
        publish(out, predicted, title=f"{o.model}: error of {len(plans)} random mixed plans, {names[0]}", seed=o.seed)
    publish(out, curve, title=f"{o.model}: how many probes", seed=o.seed)
    publish(out, cells, title=f"{o.model}: probes against the sweep, {len(graph.quantizable)} layers; seconds {seconds}", seed=o.seed, extra=shown)


if __name__ == "__main__":
    main()
