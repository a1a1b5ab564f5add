"""Many plans measured with common noise and captions, by several workers, and stored as trials; a
killed process resumes with the plans that are missing.

Each plan is measured by itself and stored whole when it is finished, so a killed worker loses the
plan it was at and nothing else, and needs no clean-up. Whoever measures a plan holds a claim on it
meanwhile (`core/claims.py`), so that the same command on several machines with one storage measures
none twice; the claim of a dead worker lapses. An executor says where the workers are.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..choices.input_quantizer import needs_inputs
from ..core.claims import LAPSE
from ..core.errors import ArtifactError, QSearchError
from ..core.graph import OpGraph
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.scheme import KEEP
from ..core.trials import Trial, Trials
from .evaluation import Outcome, directions, make, measurements
from .executing import Do, ExecutorOptions, Task, WorkerLost, execute
from .pipelines import Call, check_metrics, load_pipeline, model_of
from .placement import check_placement
from .quantized_weights import QuantizedWeights, weights_for
from .setting import EvaluationSetting

Pairs = dict[str, tuple[float, float]]
Samples = dict[str, list[float]]
#: bytes of simulated weights that are kept from plan to plan; beyond that each plan makes its own
_KEPT = 8 * 2**30
_LOOK = 0.25  # share of the samples after which a clearly bad plan is stopped early
_SURE = 3.0  # standard errors by which it must be worse than it may
_WAIT = 1.0  # seconds before a plan that another worker measures is checked again


@dataclass(frozen=True)
class EvaluationTask:
    """What every worker needs to know.

    `folder`: the saved pipeline. `setting`: all that a measurement depends on besides the plan.
    `where`: the trials' path or storage URL. `stop`: metric -> value; a plan that is surely worse
    after a quarter of the samples is stopped early. `lapse`: seconds without a heartbeat after
    which another worker's claim on a plan lapses.
    """

    folder: Path
    graph: OpGraph
    setting: EvaluationSetting
    where: Path | str = field(repr=False)  # may hold a password
    device: str = "cpu"
    stop: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float32"
    lapse: float = LAPSE
    variant: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        for metric in self.stop:
            if metric not in self.setting.metrics:
                raise QSearchError(
                    f"a plan is stopped early by a metric that is measured; {metric} is not among "
                    f"{', '.join(self.setting.metrics)}"
                )

    def has(self, trial: Trial) -> bool:
        """Whether a stored trial is what this task would measure: a plan that was stopped early is,
        where plans are stopped early.
        """
        return trial.setting == self.setting.key and (bool(self.stop) or not trial.stopped)


class EvaluationWorker:
    """A pipeline and what it makes in full precision: one plan after another is measured against
    it.

    What the schemes of all plans choose by is recorded and calibrated once, before the first plan.
    """

    def __init__(self, task: EvaluationTask, pipe: Any, plans: Mapping[str, Plan]) -> None:
        self.task, self.pipe = task, pipe
        self.total = len(task.setting.prompts)
        self.first = max(3, int(self.total * _LOOK)) if task.stop else self.total
        check_metrics(pipe, task.setting.metrics, task.setting.sampling, task.setting.prompts)
        graph = task.graph
        self.calls = _chosen_by(task, pipe, plans.values())
        common = [plan for plan in plans.values() if len(plan.steps) == 1]
        self.weights = weights_for(model_of(pipe, graph.components), graph, common, self.calls)
        kept = {(n, s) for plan in common for n, (s, *_) in plan.weights.items() if s != KEEP}
        self.keeps = sum(4 * graph.layer(name).weights for name, _ in kept) <= _KEPT
        own = self._made(Plan.uniform(graph, KEEP), 0, self.total)
        self.reference = replace(own, real=task.setting.real)

    def _weights(self, plan: Plan) -> QuantizedWeights:
        """What a plan is carried out with; one over ranges of steps is calibrated by itself."""
        if len(plan.steps) > 1:
            graph = self.task.graph
            return weights_for(model_of(self.pipe, graph.components), graph, [plan], self.calls)
        return self.weights if self.keeps else self.weights.fresh()

    def _made(self, plan: Plan, start: int, end: int) -> Outcome:
        c = self.task
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
        """(metric -> mean and standard error, metric -> value of each sample, whether the plan was
        stopped early).
        """
        c, total = self.task.setting, self.total
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
        for metric, limit in self.task.stop.items():
            mean, error = found[metric]
            sign = -1 if metric_words(metric).lower_is_better else 1
            if sign * (mean - limit) < -_SURE * error:
                return True
        return False


def _chosen_by(task: EvaluationTask, pipe: Any, plans: Iterable[Plan]) -> list[Call]:
    """The calls that schemes choose by, recorded where some scheme of the plans does."""
    calibration = task.setting.calibration
    asked = any(needs_inputs(s) for plan in plans for s in plan.schemes)
    if not asked or calibration is None:
        return []
    return calibration.record(pipe, task.graph.components)


def _part(outcome: Outcome, count: int) -> Outcome:
    return Outcome(outcome.prompts[:count], outcome.latents[:count], outcome.pictures[:count], ())


def _measured(made: Outcome, reference: Outcome, metrics: tuple[str, ...]) -> tuple[Pairs, Samples]:
    found = measurements(made, reference, metrics)
    samples = {name: list(m.samples) for name, m in found.items() if m.samples}
    return {name: (m.mean, m.error) for name, m in found.items()}, samples


def measure_plans(
    task: EvaluationTask,
    plans: Mapping[str, Plan],
    options: ExecutorOptions | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
    pipe: Any = None,
) -> int:
    """Measure those plans that the trials lack in this setting.

    Args:
        task: what every worker needs to know.
        plans: name -> plan.
        options: executor and workers; one after the other here when left out.
        progress: called with 1 for each plan, also for those that another worker measured.
        say: called with plans that are skipped (their pictures are not finite) or stopped early.
        pipe: the pipeline where it is loaded already, for the executor `local`.

    Returns:
        How many were measured now.

    Raises:
        WorkerLost: workers were killed, or Ray's head went away; what is measured stays.
        QSearchError: no plan at all could be measured.
    """
    asked = options or ExecutorOptions()
    progress, say = progress or (lambda n: None), say or (lambda line: None)
    if pipe is not None:
        check_placement(pipe, model_of(pipe, task.graph.components), say)
    trials = Trials(task.where, task.graph)
    known = {t.plan for t in trials.all() if task.has(t)}
    todo = {name: plan for name, plan in plans.items() if plan.id not in known}
    progress(len(plans) - len(todo))
    names = list(todo)
    random.Random(os.getpid()).shuffle(names)  # two machines seldom begin the same plan
    begin = partial(_begin, task, todo, pipe if asked.name == "local" else None)
    parts, done, failed = deque[Any](names), 0, list[str]()
    try:
        for name, one in execute(Task(begin, task.device), parts, asked, say):
            if one.claimed:
                parts.append(name)  # later, when it is measured or its claim has lapsed
                continue
            done += one.measured
            progress(1)
            if one.failed:
                failed.append(one.failed)
            if one.line:
                say(one.line)
    except WorkerLost as error:
        left = len(todo) - done
        raise WorkerLost(
            f"{error}, with {left} of {len(plans)} plans to go; what was measured is stored: the "
            "same command goes on"
        ) from None
    if failed and len(failed) == len(todo):
        raise QSearchError(f"none of the {len(todo)} plans could be measured: {failed[0]}")
    return done


@dataclass(frozen=True)
class _Done:
    """What came of one plan: whether it was measured now, why not, a line for people.

    `claimed`: another worker measures it.
    """

    measured: int = 0
    line: str = ""
    failed: str = ""
    claimed: bool = False


def _begin(task: EvaluationTask, plans: dict[str, Plan], pipe: Any, device: str) -> Do:
    """In a worker: load the pipeline, and sample once in full precision."""
    trials = Trials(task.where, task.graph)
    trials.describe(task.setting.key, task.setting.said)
    claims = trials.claims(task.lapse)
    bench = EvaluationWorker(
        task,
        pipe or load_pipeline(task.folder, device, task.dtype, task.variant, offload=task.offload),
        plans,
    )

    def do(name: str) -> _Done:
        plan, key = plans[name], task.setting.key
        with claims.held(f"{plan.id} {key}") as mine:
            if trials.knows(plan.id, key, stopped=bool(task.stop)):
                return _Done()
            if not mine:
                time.sleep(min(_WAIT, task.lapse / 8))
                return _Done(claimed=True)
            return _one(bench, trials, name, plan)

    return do


def _one(bench: EvaluationWorker, trials: Trials, name: str, plan: Plan) -> _Done:
    c = bench.task
    try:
        pairs, samples, stopped = bench.measure(plan)
        if not trials.knows(plan.id, c.setting.key, stopped=bool(c.stop)):  # after a long pause
            add = partial(trials.add, name, plan, pairs, c.setting.key, samples=samples)
            add(stopped=stopped, higher_is_better=directions(c.setting.metrics))
    except ArtifactError:  # the trials can't be written
        raise
    except QSearchError as error:
        return _Done(line=f"{name} is passed over: {error}", failed=str(error))
    return _Done(1, f"{name} was stopped early after {bench.first} samples" if stopped else "")
