"""Quantized video on scenes-video: ViDiT-Q's recipes and ours at equal stored bits, plans by the
metric that matters, ranges of steps, what of it is more than noise, and surrogates from pictures.

    python notebooks/figures/video.py --part methods [--samples 64] [--steps 10]
        [--folder runs/video]
    python notebooks/figures/video.py --part decoupled
    python notebooks/figures/video.py --part ranges
    python notebooks/figures/video.py --part reliability [--seeds 3]
    python notebooks/figures/video.py --part surrogates [--plans 88]

`methods`: full precision, ViDiT-Q at W8A8, W4A8 and W4A8-MP, uniform W4A8, naive min-max, and a
plan of ours with 8-bit inputs, the last two at the stored bits of W4A8-MP. `decoupled`: plans of
our choices at the same stored bits, allocated by one metric (noise of a call, or sqnr through the
clean clip) and by `scored`, each layer by its own. `ranges`: weights stored once in 4 bits, inputs
of 4, 6 or 8 bits, 5 in the mean by bit operations, in 1, 2 or 4 ranges of steps.
All plans see the same captions and noise. A cell is the mean over clips and its standard error
(Fréchet distance: a jackknife over 8 parts of the clips); `d METRIC` the difference from the plan
named in the title, clip by clip, with the standard error of these differences; `beyond` names the
metrics whose difference is more than two of them. temporal and sqnr are dB against full precision,
flow the warping error (squared, pixels in [0, 1]).
`reliability`: intraclass correlations. Of a table: between sites, within each scheme and step bin,
over tables made with captions, noise and probes of their own (one table, and the mean of all),
beside what one table says of itself. Of measured plans: between the plans of the first two parts,
over 8 parts of their clips (one part, and all).
`surrogates`: Spearman of predicted with measured plans of scenes-video, learnt from plans of the
zoo's DiT and U-Net alone, and from 16 and 64 plans of its own; ± is a bootstrap's over plans, or
the deviation over draws. Plans have 8 clips or 16 pictures each, 6 steps, 2 to 4 bits.
`methods` and `decoupled` draw strips too: two captions by every plan (video-PART.png), and of each
plan the clip that lost most, below full precision's (video-PART-worst.png). Writes
video-PART.json. Resumable: what was made lies in FOLDER, under the digest of weights and commit.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from figure import commit, publish
from measured_plans import SCHEMES, graph_of
from methods import FOLDER as RECIPES
from methods import naive, recipe_plan
from ranges import CHOICES, plans_of
from scipy.stats import spearmanr
from surrogates import alone, ceiling, curve
from worlds import prompts_of, sampling_of
from zoo_video import strips, with_error

from qsearch import zoo
from qsearch.core import plugins
from qsearch.core.artifacts import digest
from qsearch.core.cost import Budget, select
from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP
from qsearch.core.table import SensitivityTable
from qsearch.core.trials import Trials
from qsearch.decide.allocation import allocate
from qsearch.decide.draws import draw
from qsearch.learn.fitting import Study, training_set
from qsearch.measure.evaluation import Outcome, evaluated, make, pictures_of
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.metrics import frechet
from qsearch.measure.pipelines import load_pipeline
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.setting import EvaluationSetting
from qsearch.stages import config as configs
from qsearch.stages.allocate import make_plan
from qsearch.stages.calibrate import calibration_calls, plan_weights
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile

PARTS = ("methods", "decoupled", "ranges", "reliability", "surrogates")
METRICS = ("alignment", "motion", "temporal", "flow", "frechet", "ssim", "sqnr")
#: metrics of a clip by itself, and of the set, whose differences from full precision have a meaning
ALONE = ("alignment", "motion", "flow", "frechet")
MIXED = "viditq-video-w4a8-mp"
THEIRS = ("uint4-c", "uint8-c")
OURS = tuple(f"uint{bits}-c+a8@gptq" for bits in (2, 3, 4, 5, 6, 8))
#: parts of the clips, for a jackknife and for the reliability of plans
FOLDS = 8
#: mean bits of inputs over ranges of steps
INPUT_BITS = 5
#: clips by every plan on the sheet of strips
SHOWN = 2
#: learnt from, and asked about
TEACHERS, PUPIL = ("scenes-dit", "scenes-unet"), "scenes-video"
LEARNT = (16, 64)
#: of each of their plans: clips, or pictures, and sampler steps; probes of a table
CLIPS, PICTURES, STEPS, PROBES = 8, 16, 6, 8


@dataclass(frozen=True)
class Measured:
    """Metrics of a plan: of each clip, and the Fréchet distance of all clips, without each of the
    `FOLDS` parts, and of each part.
    """

    clips: dict[str, list[float]]
    frechet: float
    without: list[float]
    parts: list[float]

    def mean(self, metric: str) -> tuple[float, float]:
        """Mean and standard error."""
        if metric == "frechet":
            return self.frechet, jackknife(self.without)
        return with_error(self.clips[metric])

    def more(self, other: Measured, metric: str) -> tuple[float, float]:
        """Difference from another plan on the same clips, and its standard error."""
        if metric == "frechet":
            pairs = [a - b for a, b in zip(self.without, other.without, strict=True)]
            return self.frechet - other.frechet, jackknife(pairs)
        both = zip(self.clips[metric], other.clips[metric], strict=True)
        return with_error([a - b for a, b in both])

    def by_part(self, metric: str) -> list[float]:
        """Of each part of the clips."""
        if metric == "frechet":
            return self.parts
        return [statistics.mean(self.clips[metric][i::FOLDS]) for i in range(FOLDS)]


def jackknife(values: Sequence[float]) -> float:
    """Standard error from values without a part each."""
    mean = statistics.mean(values)
    return math.sqrt((len(values) - 1) / len(values) * sum((v - mean) ** 2 for v in values))


class Bench:
    """Clips of every plan, measured once and kept in a folder of these weights and this commit."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.folder
        key = digest([self.run(MIXED).model_key, commit(), options.samples, options.steps])
        self.folder = options.folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        run = self.run(MIXED)
        self.pipe, self.graph = run.pipe, extract(run)
        self.prompts = run.prompts(options.samples, part=1)
        self.sampling = replace(run.sampling, seed=run.config.seed + 500_000)

    def run(self, name: str, place: str = "", **profiled: Any) -> Run:
        """A recipe's run in a folder of its own, its profile section with other settings."""
        config = configs.load(RECIPES / f"{name}.yaml")
        sampling = config.sampling.model_copy(update={"steps": self.options.steps})
        asked = {"profile": config.profile.model_copy(update=profiled), "sampling": sampling}
        return Run(config.model_copy(update={"folder": self.folder / (place or name), **asked}))

    @cached_property
    def priced(self) -> tuple[Run, SensitivityTable]:
        """Their choices and ours, priced by every metric: one table for two parts."""
        run = self.run(MIXED, "priced", schemes=(*THEIRS, *OURS))
        return run, profile(run, self.graph)

    @cached_property
    def whole(self) -> Outcome:
        """What full precision makes."""
        return self.outcome(self.latents(Plan.uniform(self.graph, KEEP), lambda: None))

    def outcome(self, latents: torch.Tensor) -> Outcome:
        """Latents with their pictures."""
        pictures = pictures_of(self.pipe, latents, self.sampling, self.prompts)
        channels = int(self.pipe.vae.config.z_dim)
        return Outcome(self.prompts, latents, pictures, (), channels)

    def latents(self, plan: Plan, weights: Callable[[], Any]) -> torch.Tensor:
        """Final latents of a plan, kept."""
        path = self.folder / f"{plan.id}.pt"
        if not path.exists():
            made = make(self.pipe, self.graph, plan, self.prompts, self.sampling, weights=weights())
            torch.save(made.latents, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found

    def measured(self, run: Run, plan: Plan) -> Measured:
        """Metrics of a plan, kept."""
        path = self.folder / f"{plan.id}.json"
        if not path.exists():

            def weights() -> Any:
                calls = calibration_calls(run, self.graph, plan.schemes)
                return plan_weights(run, self.graph, plan, calls, learn=False)

            made = self.outcome(self.latents(plan, weights))
            found, clips = evaluated(made, self.whole, METRICS)
            places = torch.arange(len(made.pictures)) % FOLDS
            cut = [made.pictures[places == i] for i in range(FOLDS)]
            rest = [made.pictures[places != i] for i in range(FOLDS)]
            far = [[frechet.frechet(x) for x in these] for these in (rest, cut)]
            kept = Measured(clips, found["frechet"][0], *far)
            path.write_text(json.dumps(vars(kept)), encoding="utf-8")
        return Measured(**json.loads(path.read_text(encoding="utf-8")))


def plans(part: str, bench: Bench) -> Iterator[tuple[str, Run, Plan]]:
    """(what it is, its run, plan); the first is what the others are compared with."""
    graph = bench.graph
    if part == "ranges":
        run = bench.run(MIXED, "ranges", schemes=CHOICES, metrics=("noise",), score={})
        for name, plan in plans_of(graph, profile(run, graph), INPUT_BITS, (1, 2, 4)).items():
            yield name, run, plan
        return
    run, table = bench.priced
    rules = run.config.allocate
    kept = {layer.name for pattern in rules.protected for layer in select(graph, pattern)}
    allowed = {x.name: THEIRS for x in graph.quantizable if x.name not in kept}
    theirs = rules.model_copy(update={"allowed": allowed})
    mixed = make_plan(theirs, graph, table)
    budget = Budget(average_bits=mixed.achieved.average_bits)
    if part == "methods":
        yield "full precision", run, Plan.uniform(graph, KEEP)
        for name in ("viditq-video-w8a8", "viditq-video-w4a8"):
            yield name, bench.run(name), recipe_plan(bench.run(name), graph)
        yield MIXED, run, mixed
        yield "uniform W4A8", run, Plan.uniform(graph, "uint4-c+a8")
        yield "naive", run, naive(graph, mixed)
        yield "ours", run, allocate(graph, table, budget, schemes=OURS)
    else:
        for metric in ("noise", "scored", "sqnr"):
            yield f"by {metric}", run, allocate(graph, table, budget, metric=metric, schemes=OURS)


def rows_of(found: dict[str, tuple[Plan, Measured]], against: str) -> list[dict[str, Any]]:
    """A row a plan: stored bits, bit operations, metrics, differences from the plan `against`."""
    rows = []
    metrics = ALONE if against == "full precision" else METRICS
    for name, (plan, measured) in found.items():
        cost = plan.achieved
        row: dict[str, Any] = {"plan": name, "stored bits": cost.average_bits}
        row["bit operations"] = f"{cost.bit_operations:.4g}"
        row |= {m: said(*measured.mean(m)) for m in METRICS}
        more = {m: measured.more(found[against][1], m) for m in metrics}
        row |= {f"d {m}": f"{v:+.3g} ± {e:.2g}" for m, (v, e) in more.items()}
        row["beyond"] = ", ".join(m for m, (v, e) in more.items() if abs(v) > 2 * e) or "-"
        rows.append(row)
    return rows


def said(value: float, error: float) -> str:
    """A number with its error."""
    return f"{value:.4g} ± {error:.2g}"


def compare(part: str, bench: Bench) -> None:
    """Measure the plans of a part, publish them, draw strips."""
    found: dict[str, tuple[Plan, Measured]] = {}
    for name, run, plan in plans(part, bench):
        found[name] = plan, bench.measured(run, plan)
        print(name, {m: said(*found[name][1].mean(m)) for m in METRICS}, flush=True)
    against = next(iter(found))
    rows = rows_of(found, against)
    extra: dict[str, Any] = {}
    if part == "methods":
        alike = {n: v for n, v in found.items() if n in ("ours", MIXED, "naive", "uniform W4A8")}
        extra["against ours"] = rows_of(alike, "ours")
        publish(named(part), extra["against ours"], title="d: more than ours", seed=0)
    if part != "ranges":
        draw_strips(part, bench, found)
    sizes = f"{bench.options.samples} clips, {bench.options.steps} steps"
    publish(named(part), rows, title=f"{sizes}; d: more than {against}", seed=0, extra=extra)


def named(part: str) -> str:
    """The script's name for a part's JSON."""
    return str(Path(__file__).with_name(f"video-{part}.py"))


def draw_strips(part: str, bench: Bench, found: dict[str, tuple[Plan, Measured]]) -> None:
    """The first captions by every plan; of each plan the clip that lost most alignment and motion,
    below full precision's.
    """
    whole = bench.measured(bench.run(MIXED), Plan.uniform(bench.graph, KEEP))
    everything = {"full precision": whole} | {n: m for n, (_, m) in found.items()}
    made = {"full precision": bench.whole.latents}
    made |= {n: bench.latents(plan, lambda: None) for n, (plan, _) in found.items()}

    def marks(name: str) -> list[float]:
        clips = everything[name].clips
        return [a + b for a, b in zip(clips["alignment"], clips["motion"], strict=True)]

    first = [(name, i) for i in range(SHOWN) for name in made]
    worst = []
    for name in [n for n in made if n != "full precision"]:
        lost = [a - b for a, b in zip(marks("full precision"), marks(name), strict=True)]
        place = lost.index(max(lost))
        worst += [("full precision", place), (name, place)]
    for ending, shown in (("", first), ("-worst", worst)):
        latents = torch.stack([made[name][i] for name, i in shown])
        clips = pictures_of(bench.pipe, latents, bench.sampling, bench.prompts).transpose(1, 2)
        labels = []
        for name, i in shown:
            looks, motion = (everything[name].clips[m][i] for m in ("alignment", "motion"))
            text = bench.prompts.texts[i]
            labels.append(f"{name}  alignment {looks:.2f}  motion {motion:.2f}  {text}")
        strips(Path(__file__).with_name(f"video-{part}{ending}.png"), clips, labels)


def icc(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Intraclass correlations of `values` [targets, repetitions], two-way, consistency: of one
    repetition, and of the mean of all (Shrout and Fleiss 1979, ICC(3,1) and ICC(3,k)).
    """
    n, k = values.shape
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    between = k * float(np.square(rows - values.mean()).sum()) / (n - 1)
    rest = float(np.square(values - rows - columns + values.mean()).sum()) / ((n - 1) * (k - 1))
    if between <= 0:
        return 0.0, 0.0
    return (between - rest) / (between + (k - 1) * rest), 1 - rest / between


def reliability(bench: Bench) -> None:
    """How much of a ranking another seed finds again: of sites by tables, of plans by clips."""
    metrics = ("noise", "sqnr", "temporal", "alignment", "motion", "flow", "ssim", "frechet")
    probed = [m for m in metrics if m == "noise" or hasattr(plugins.load("metrics", m), "features")]
    tables = []
    for seed in range(bench.options.seeds):
        run = bench.run(
            MIXED, f"seed{seed}", schemes=("uint3-c", "uint4-c"), metrics=tuple(probed), score={},
            bins=2, samples=2,
        )  # fmt: skip
        other = run.config.model_copy(update={"seed": 1000 + seed})
        tables.append(profile(Run(other), bench.graph))
    found = {
        part: {name: bench.measured(run, plan) for name, run, plan in plans(part, bench)}
        for part in ("methods", "decoupled")
    }
    every = [m for part in found.values() for n, m in part.items() if n != "full precision"]
    alike = [found["methods"][n] for n in (MIXED, "ours")]
    alike += [found["decoupled"][n] for n in ("by scored", "by sqnr")]
    rows = []
    for metric in metrics:
        row: dict[str, Any] = {"metric": metric}
        one, mean = table_icc(tables, metric) if metric in probed else (math.nan, math.nan)
        row["one table"], row["mean of tables"] = one, mean
        row["said by a table"] = (
            statistics.mean(t.reliability(metric) for t in tables) if metric in probed else math.nan
        )
        for name, some in (("plans", every), ("plans of equal bits", alike)):
            values = [m.by_part(metric) for m in some] if metric in METRICS else []
            one, mean = icc(np.array(values)) if values else (math.nan, math.nan)
            row[f"{name}, one part"], row[f"{name}, all clips"] = one, mean
        rows.append(row)
    title = f"intraclass correlation; {len(tables)} tables, {FOLDS} parts of the clips"
    publish(named("reliability"), rows, title=title, seed=0)


def table_icc(tables: Sequence[SensitivityTable], metric: str) -> tuple[float, float]:
    """`icc` of log estimates between sites, in the mean over schemes and step bins."""
    frames = [t.frame[(t.frame["metric"] == metric) & (t.frame["estimate"] > 0)] for t in tables]
    keys = ["scheme", "step", "site"]
    both = [frame.set_index(keys)["estimate"].rename(i) for i, frame in enumerate(frames)]
    joined = pd.concat(both, axis=1, join="inner")
    cells = joined.groupby(level=["scheme", "step"])
    found = [icc(np.log(cell.to_numpy())) for _, cell in cells if len(cell) > 2]
    one, mean = (statistics.mean(v) for v in zip(*found, strict=True))
    return one, mean


def study(model: str, folder: Path, options: argparse.Namespace) -> Study:
    """Random plans of a model, measured, and one table of single steps; what lies in the folder is
    not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(zoo.folder(model))
    graph = graph_of(pipe, folder, model)
    samples = CLIPS if model in zoo.VIDEO_NAMES else PICTURES
    steps, metrics = STEPS, ("sqnr", "alignment")
    path = folder / "step.parquet"
    try:
        table = SensitivityTable.load(path, graph.id)
    except QSearchError:
        table = profile_pipeline(
            pipe,
            graph,
            prompts_of(model, 4, 0),
            sampling_of(model, steps),
            schemes=SCHEMES,
            bins=2,
            batch=1,
            probes=PROBES,
            metrics=metrics,
        )
        table.save(path)
    prompts, sampling = prompts_of(model, samples, 1), sampling_of(model, steps, seed=500_000)
    key = digest([model, samples, steps, metrics])
    setting = EvaluationSetting(prompts, sampling, metrics, key)
    task = EvaluationTask(zoo.folder(model), graph, setting, folder / "trials.db")
    asked = draw(graph, SCHEMES, options.plans, seed=0)
    measure_plans(task, asked, ExecutorOptions(), say=print, pipe=pipe)
    return Study(graph, Trials(folder / "trials.db", graph).measured(), (table,))


def across(metric: str, studies: dict[str, Study]) -> Iterator[dict[str, Any]]:
    """Spearman of predicted with measured plans of video, a row a predictor."""
    every = [studies[name] for name in (*TEACHERS, PUPIL)]
    own = training_set(every[-1:], metric, "ridge")
    fixed = {"metric": metric, "plans": len(own.target)}

    def row(predictor: str, value: float, spread: float, learnt: int = 0) -> dict[str, Any]:
        said = {"predictor": predictor, "learnt from": learnt}
        return fixed | said | {"Spearman": value, "±": spread}

    yield row("two halves of the clips, stepped up", ceiling(every[-1], metric), math.nan)
    yield row("average bits alone", alone(own, "bits"), math.nan)
    for column in (f"{metric}/plan", f"{metric}/sum"):
        if column in own.data.columns:
            yield row(f"probes alone, {column}", alone(own, column), math.nan)
    taken = training_set(every, metric, "ridge")
    others = taken.homes < len(TEACHERS)
    for kind in ("ridge", "xgboost"):
        learn = plugins.load("surrogates", kind).fit
        made = learn(taken.data.rows(np.flatnonzero(others)), taken.target[others], 0)
        guess = made.predict(taken.data.rows(np.flatnonzero(~others)))
        pairs = np.stack([guess, taken.target[~others]])
        dice = np.random.default_rng(0)
        draws = dice.integers(0, pairs.shape[1], (200, pairs.shape[1]))
        again = [float(spearmanr(*pairs[:, d]).statistic) for d in draws]
        value = float(spearmanr(*pairs).statistic)
        yield row(f"{kind}, from {' and '.join(TEACHERS)}", value, float(np.std(again)),
                  int(others.sum()))  # fmt: skip
        for size in LEARNT:
            if size + 16 <= len(own.target):
                one = curve(own, kind, size, 10)
                yield row(f"{kind}, from its own", one["SRCC"], one["spread"], size)


def surrogates(options: argparse.Namespace) -> None:
    """Measure plans of three models, learn, ask about video, publish."""
    studies = {}
    for model in (*TEACHERS, PUPIL):
        run = Run(configs.load(RECIPES / f"{MIXED}.yaml").model_copy(
            update={"model": model, "folder": options.folder}
        ))  # fmt: skip
        key = digest([run.model_key, commit(), options.plans])
        studies[model] = study(model, options.folder / f"{model}-{key}", options)
    rows = [row for metric in ("sqnr", "alignment") for row in across(metric, studies)]
    publish(named("surrogates"), rows, title="plans of scenes-video, predicted", seed=0)


def main() -> None:
    """Measure what is missing of a part, publish it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", required=True, choices=PARTS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plans", type=int, default=88)
    parser.add_argument("--folder", type=Path, default=Path("runs/video"))
    options = parser.parse_args()
    if options.part == "surrogates":
        surrogates(options)
    elif options.part == "reliability":
        reliability(Bench(options))
    else:
        compare(options.part, Bench(options))


if __name__ == "__main__":
    main()
