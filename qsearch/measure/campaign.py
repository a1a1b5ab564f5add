"""Campaign: many plans measured with common noise and captions, by several workers, kept as trials; killed at any moment it goes on where it was.

Each plan is measured by itself and stored whole when it is finished, so a killed worker loses the plan it was at and nothing else, and needs no
clean-up: no plan is ever marked as begun. Workers on one machine share a list; on several machines (or GPUs) the same command with the same storage
URL does the rest: each looks at what is stored before it begins the next plan, in an order of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import plugins
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import KEEP
from ..core.trials import Trial, Trials
from .evaluation import Outcome, evaluate, make
from .pipelines import Prompts, Sampling, denoiser_of, load_pipeline
from .simulation import QuantizedWeights

Pairs = dict[str, tuple[float, float]]
Samples = dict[str, list[float]]
#: bytes of simulated weights that are kept from plan to plan; beyond that each plan makes its own
_KEPT = 8 * 2**30
_RESAMPLES = 1000
_LOOK = 0.25  # share of the samples after which a clearly bad plan is given up
_SURE = 3.0  # standard errors by which it must be worse than it may


@dataclass(frozen=True)
class Campaign:
    """What every worker is told. `folder`: the saved pipeline. `setting`: digest of all that a measurement depends on besides the plan.

    `where`: the trials' path or storage URL. `stop`: metric -> value; a plan that is surely worse after a quarter of the samples is given up.
    """

    folder: Path
    graph: OpGraph
    prompts: Prompts
    sampling: Sampling
    metrics: tuple[str, ...]
    setting: str
    where: Path | str
    device: str = "cpu"
    stop: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for metric in self.stop:
            if metric not in self.metrics:
                raise QSearchError(
                    f"a plan is given up by a metric that is measured; {metric} is not among {', '.join(self.metrics)}"
                )

    def has(self, trial: Trial) -> bool:
        """Whether a stored trial is what this campaign would measure: a plan that was given up is, where plans are given up."""
        return trial.setting == self.setting and (bool(self.stop) or not trial.stopped)


class Bench:
    """A pipeline and what it makes in full precision: one plan after another is measured against it."""

    def __init__(self, campaign: Campaign, pipe: Any, plans: Mapping[str, BitPlan]) -> None:
        self.campaign, self.pipe = campaign, pipe
        self.first = (
            max(3, int(len(campaign.prompts) * _LOOK)) if campaign.stop else len(campaign.prompts)
        )
        graph = campaign.graph
        kept = {
            (layer, s)
            for plan in plans.values()
            for layer, s in plan.layers.items()
            if s.format != "keep"
        }
        small = sum(4 * graph.layer(layer).weights for layer, _ in kept) <= _KEPT
        self.weights = QuantizedWeights(denoiser_of(pipe), graph) if small else None
        self.reference = self._made(BitPlan.uniform(graph, KEEP), 0, len(campaign.prompts))

    def _made(self, plan: BitPlan, start: int, end: int) -> Outcome:
        c = self.campaign
        return make(
            self.pipe,
            c.graph,
            plan,
            c.prompts[start:end],
            c.sampling,
            weights=self.weights,
            first=start,
        )

    def measure(self, plan: BitPlan) -> tuple[Pairs, Samples, bool]:
        """(metric -> mean and standard error, metric -> value of each sample, whether the plan was given up)."""
        c, total = self.campaign, len(self.campaign.prompts)
        made = self._made(plan, 0, self.first)
        reference = self.reference if self.first == total else _part(self.reference, self.first)
        found = _measured(made, reference, c.metrics)
        if self.first == total or self._hopeless(found[0]):
            return *found, self.first < total
        rest = self._made(plan, self.first, total)
        whole = Outcome(
            c.prompts,
            torch.cat([made.latents, rest.latents]),
            torch.cat([made.pictures, rest.pictures]),
            (),
        )
        return *_measured(whole, self.reference, c.metrics), False

    def _hopeless(self, found: Pairs) -> bool:
        for metric, limit in self.campaign.stop.items():
            mean, error = found[metric]
            sign = 1 if plugins.load("metrics", metric).higher_is_better else -1
            if sign * (mean - limit) < -_SURE * error:
                return True
        return False


def _part(outcome: Outcome, count: int) -> Outcome:
    return Outcome(outcome.prompts[:count], outcome.latents[:count], outcome.pictures[:count], ())


def _measured(made: Outcome, reference: Outcome, metrics: tuple[str, ...]) -> tuple[Pairs, Samples]:
    values = {name: plugins.load("metrics", name).measure(made, reference) for name in metrics}
    samples = {
        name: [float(x) for x in v] for name, v in values.items() if isinstance(v, torch.Tensor)
    }
    pairs = {name: (float(np.mean(v)), bootstrap_error(v)) for name, v in samples.items()}
    rest = tuple(
        name for name in metrics if name not in samples
    )  # over all samples at once: their errors are a jackknife's
    return pairs | (evaluate(made, reference, rest) if rest else {}), samples


def bootstrap_error(values: list[float]) -> float:
    """Standard error of the mean: the spread of the means of `_RESAMPLES` samples drawn with replacement, always the same ones; 0 for one value."""
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    return float(np.asarray(values)[drawn].mean(1).std(ddof=1))


def measure_plans(
    campaign: Campaign,
    plans: Mapping[str, BitPlan],
    *,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
    pipe: Any = None,
) -> int:
    """Measure those of `plans` (by name) that the trials lack in this setting; returns how many were measured now.

    `progress(1)` after each plan, also for those that somebody else measured meanwhile. `pipe`: the pipeline where it is loaded already (one worker).
    A plan whose pictures are not finite is passed over with a word. Raises `QSearchError` when a worker is killed; what is measured stays.
    """
    if workers < 1:
        raise QSearchError(f"plans are measured by one worker or more; given {workers}")
    trials = Trials(campaign.where, campaign.graph)
    known = {t.plan for t in trials.all() if campaign.has(t)}
    todo = {name: plan for name, plan in plans.items() if plan.id not in known}
    progress, say = progress or (lambda n: None), say or (lambda line: None)
    progress(len(plans) - len(todo))
    names = list(todo)
    random.Random(os.getpid()).shuffle(names)  # two machines seldom begin the same plan
    done = 0
    try:
        for count, line in _results(campaign, {name: todo[name] for name in names}, workers, pipe):
            done += count
            progress(1)
            if line:
                say(line)
    except BrokenProcessPool:
        left = len(todo) - done
        raise QSearchError(
            f"a worker was killed (out of memory?) with {left} of {len(plans)} plans to go; what was measured is stored: the same command goes on"
        ) from None
    return done


def _results(campaign: Campaign, plans: dict[str, BitPlan], workers: int, pipe: Any) -> Any:
    """(1 or 0, a line for people) for each plan, as they are finished."""
    if not plans:
        return
    if workers == 1:
        bench = Bench(campaign, pipe or load_pipeline(campaign.folder, campaign.device), plans)
        for name, plan in plans.items():
            yield _one(bench, name, plan)
        return
    with ProcessPoolExecutor(
        min(workers, len(plans)), get_context("spawn"), _begin, (campaign, plans, workers)
    ) as pool:
        for future in as_completed([pool.submit(_work, name) for name in plans]):
            yield future.result()


_own: tuple[Bench, dict[str, BitPlan]] | None = None  # of a worker process


def _begin(campaign: Campaign, plans: dict[str, BitPlan], workers: int) -> None:
    global _own  # noqa: PLW0603 (a worker process has one bench, and a pool hands it nothing but the next name)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _own = Bench(campaign, load_pipeline(campaign.folder, campaign.device), plans), plans


def _work(name: str) -> tuple[int, str]:
    assert _own is not None, "a worker begins before it works"
    bench, plans = _own
    return _one(bench, name, plans[name])


def _one(bench: Bench, name: str, plan: BitPlan) -> tuple[int, str]:
    c = bench.campaign
    trials = Trials(c.where, c.graph)
    if any(t.plan == plan.id and c.has(t) for t in trials.all()):
        return 0, ""
    try:
        pairs, samples, stopped = bench.measure(plan)
        trials.add(name, plan, pairs, c.setting, samples=samples, stopped=stopped)
    except QSearchError as error:
        return 0, f"{name} is passed over: {error}"
    return 1, f"{name} was given up after {bench.first} samples" if stopped else ""
