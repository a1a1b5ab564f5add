"""Campaign: many plans measured with common noise and captions, by several workers, kept as trials; killed at any moment it goes on where it was.

Each plan is measured by itself and stored whole when it is finished, so a killed worker loses the plan it was at and nothing else, and needs no
clean-up: no plan is ever marked as begun. Workers on one machine share a list; on several machines (or GPUs) the same command with the same storage
URL does the rest: each looks at what is stored before it begins the next plan, in an order of its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..choices.input_quantizer import needs_inputs
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.scheme import KEEP
from ..core.trials import Trial, Trials
from .evaluation import Outcome, directions, make, measurements
from .pipelines import Call, check_metrics, load_pipeline, model_of
from .quantized_weights import QuantizedWeights, weights_for
from .setting import EvaluationSetting

Pairs = dict[str, tuple[float, float]]
Samples = dict[str, list[float]]
#: bytes of simulated weights that are kept from plan to plan; beyond that each plan makes its own
_KEPT = 8 * 2**30
_LOOK = 0.25  # share of the samples after which a clearly bad plan is given up
_SURE = 3.0  # standard errors by which it must be worse than it may


@dataclass(frozen=True)
class Campaign:
    """What every worker is told.

    `folder`: the saved pipeline. `setting`: all that a measurement depends on besides the plan.
    `where`: the trials' path or storage URL. `stop`: metric -> value; a plan that is surely worse
    after a quarter of the samples is given up.
    """

    folder: Path
    graph: OpGraph
    setting: EvaluationSetting
    where: Path | str
    device: str = "cpu"
    stop: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for metric in self.stop:
            if metric not in self.setting.metrics:
                raise QSearchError(
                    f"a plan is given up by a metric that is measured; {metric} is not among "
                    f"{', '.join(self.setting.metrics)}"
                )

    def has(self, trial: Trial) -> bool:
        """Whether a stored trial is what this campaign would measure: a plan that was given up is, where plans are given up."""
        return trial.setting == self.setting.key and (bool(self.stop) or not trial.stopped)


class Bench:
    """A pipeline and what it makes in full precision: one plan after another is measured against it.

    What the schemes of all plans choose by is recorded and calibrated once, before the first plan.
    """

    def __init__(self, campaign: Campaign, pipe: Any, plans: Mapping[str, Plan]) -> None:
        self.campaign, self.pipe = campaign, pipe
        self.total = len(campaign.setting.prompts)
        self.first = max(3, int(self.total * _LOOK)) if campaign.stop else self.total
        check_metrics(
            pipe, campaign.setting.metrics, campaign.setting.sampling, campaign.setting.prompts
        )
        graph = campaign.graph
        self.calls = _chosen_by(campaign, pipe, plans.values())
        common = [plan for plan in plans.values() if len(plan.steps) == 1]
        self.weights = weights_for(model_of(pipe), graph, common, self.calls)
        kept = {(n, s) for plan in common for n, (s, *_) in plan.weights.items() if s != KEEP}
        self.keeps = sum(4 * graph.layer(name).weights for name, _ in kept) <= _KEPT
        own = self._made(Plan.uniform(graph, KEEP), 0, self.total)
        self.reference = replace(own, real=campaign.setting.real)

    def _weights(self, plan: Plan) -> QuantizedWeights:
        """What a plan is carried out with; one over ranges of steps is calibrated by itself."""
        if len(plan.steps) > 1:
            model, graph = model_of(self.pipe), self.campaign.graph
            return weights_for(model, graph, [plan], self.calls)
        return self.weights if self.keeps else self.weights.fresh()

    def _made(self, plan: Plan, start: int, end: int) -> Outcome:
        c = self.campaign
        return make(
            self.pipe,
            c.graph,
            plan,
            c.setting.prompts[start:end],
            c.setting.sampling,
            weights=self._weights(plan),
            first=start,
        )

    def measure(self, plan: Plan) -> tuple[Pairs, Samples, bool]:
        """(metric -> mean and standard error, metric -> value of each sample, whether the plan was given up)."""
        c, total = self.campaign.setting, self.total
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
            sign = -1 if metric_words(metric).lower_is_better else 1
            if sign * (mean - limit) < -_SURE * error:
                return True
        return False


def _chosen_by(campaign: Campaign, pipe: Any, plans: Iterable[Plan]) -> list[Call]:
    """The calls that schemes choose by, recorded where some scheme of the plans does."""
    calibration = campaign.setting.calibration
    asked = any(needs_inputs(s) for plan in plans for s in plan.schemes)
    return calibration.record(pipe) if asked and calibration is not None else []


def _part(outcome: Outcome, count: int) -> Outcome:
    return Outcome(outcome.prompts[:count], outcome.latents[:count], outcome.pictures[:count], ())


def _measured(made: Outcome, reference: Outcome, metrics: tuple[str, ...]) -> tuple[Pairs, Samples]:
    found = measurements(made, reference, metrics)
    samples = {name: list(m.samples) for name, m in found.items() if m.samples}
    return {name: (m.mean, m.error) for name, m in found.items()}, samples


def measure_plans(
    campaign: Campaign,
    plans: Mapping[str, Plan],
    *,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
    pipe: Any = None,
) -> int:
    """Measure those of `plans` (by name) that the trials lack in this setting; returns how many were measured now.

    `progress(1)` after each plan, also for those that somebody else measured meanwhile. `pipe`: the pipeline where it is loaded already (one worker).
    A plan whose pictures are not finite is passed over with a word. Raises `QSearchError` when a worker is killed (what is
    measured stays), and when no plan at all could be measured.
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
    done, failed = 0, list[str]()
    try:
        for one in _results(campaign, {name: todo[name] for name in names}, workers, pipe):
            done += one.measured
            progress(1)
            if one.failed:
                failed.append(one.failed)
            if one.line:
                say(one.line)
    except BrokenProcessPool:
        left = len(todo) - done
        raise QSearchError(
            f"a worker was killed (out of memory?) with {left} of {len(plans)} plans to go; what "
            "was measured is stored: the same command goes on"
        ) from None
    if failed and len(failed) == len(todo):
        raise QSearchError(f"none of the {len(todo)} plans could be measured: {failed[0]}")
    return done


@dataclass(frozen=True)
class _Done:
    """What came of one plan: whether it was measured now, why not, a line for people."""

    measured: int = 0
    line: str = ""
    failed: str = ""


def _results(
    campaign: Campaign, plans: dict[str, Plan], workers: int, pipe: Any
) -> Iterator[_Done]:
    """What came of each plan, as they are finished."""
    if not plans:
        return
    if workers == 1:
        bench = Bench(campaign, pipe or _loaded(campaign), plans)
        for name, plan in plans.items():
            yield _one(bench, name, plan)
        return
    with ProcessPoolExecutor(
        min(workers, len(plans)), get_context("spawn"), _begin, (campaign, plans, workers)
    ) as pool:
        for future in as_completed([pool.submit(_work, name) for name in plans]):
            yield future.result()


_own: tuple[Bench, dict[str, Plan]] | None = None  # of a worker process


def _begin(campaign: Campaign, plans: dict[str, Plan], workers: int) -> None:
    global _own  # noqa: PLW0603 (a worker process has one bench, and a pool hands it nothing but the next name)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _own = Bench(campaign, _loaded(campaign), plans), plans


def _loaded(campaign: Campaign) -> Any:
    return load_pipeline(campaign.folder, campaign.device, campaign.dtype)


def _work(name: str) -> _Done:
    assert _own is not None, "a worker begins before it works"
    bench, plans = _own
    return _one(bench, name, plans[name])


def _one(bench: Bench, name: str, plan: Plan) -> _Done:
    c = bench.campaign
    trials = Trials(c.where, c.graph)
    if any(t.plan == plan.id and c.has(t) for t in trials.all()):
        return _Done()
    try:
        pairs, samples, stopped = bench.measure(plan)
        trials.add(
            name,
            plan,
            pairs,
            c.setting.key,
            samples=samples,
            stopped=stopped,
            higher_is_better=directions(c.setting.metrics),
        )
    except QSearchError as error:
        return _Done(line=f"{name} is passed over: {error}", failed=str(error))
    return _Done(1, f"{name} was given up after {bench.first} samples" if stopped else "")
