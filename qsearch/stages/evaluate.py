"""evaluate: the plan beside full precision, a uniform and random plans, with common noise.

Measurements go to trials.db, pictures to pictures/, the table that compares them to results.json.
Many plans for surrogates to learn from are measured by `stages/evaluate_plans.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..core import plugins
from ..core.artifacts import Header, digest, read_json, write_json
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import KEEP
from ..core.settings import Settings
from .announce import begin
from .endings import say_evaluated
from .keys import file_key, sampled
from .protocol import write_tables
from .ranges import check_ranges

if TYPE_CHECKING:
    from ..core.trials import Trial, Trials
    from ..measure.setting import EvaluationSetting
    from .folder import Run

RESULTS = "qsearch.results/1"
FULL_PRECISION, OWN = "full precision", "plan"
#: prompts on which the denoiser's own output is compared
_CALLS = 16


class EvaluateSettings(Settings):
    """Which plans are measured, on what, by which metrics."""

    samples: int | None = Field(
        None,
        ge=3,
        description="prompts, each with its own noise; 96 captions of the zoo's models when left "
        "out, of others 8 prompts or as many as the file has left",
    )
    metrics: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="plug-ins of `qsearch list metrics`; what the model's pictures can have when "
        "left out",
    )
    uniform: str | None = Field(
        "uint4-c", description="scheme of the uniform plan beside ours; none leaves it out"
    )
    random: int = Field(1, ge=0, description="random plans of the same size beside ours")
    real: Path | None = Field(
        None,
        description="folder of real pictures that fid, kid and cmmd compare with; full precision's "
        "pictures when left out",
    )


def setting_of(run: Run, verb: str, **more: Any) -> EvaluationSetting:
    """What a run's measurements depend on besides the plan.

    Args:
        run: the run.
        verb: who measures; only measurements of one verb are compared.
        more: what else counts for that verb, such as the calibration of its schemes.

    Returns:
        Prompts, sampler, metrics, calibration, and the key of all that.
    """
    from ..measure.sets import real_files
    from ..measure.setting import EvaluationSetting
    from .calibrate import calibration_of

    c = run.config
    real = c.evaluate.real
    prompts = run.prompts(run.samples, part=1)
    key = run.key(
        verb,
        model=run.model_key,
        seed=c.seed,
        prompts=digest([prompts.texts, *filter(None, [prompts.values])]),
        metrics=sorted(run.metrics),
        sampling=sampled(run.sampling),
        **({"real": [file.name for file in real_files(real)]} if real else {}),
        **more,
    )
    sampling = run.sampling_for("evaluate")
    said = {
        "sampler": f"{sampling.steps} steps, guidance {sampling.guidance:g}",
        "prompts": f"{len(prompts)} of {Path(run.prompts_name).name}",
        "weights": run.dtype,
    }
    return EvaluationSetting(prompts, sampling, run.metrics, key, calibration_of(run), real, said)


def evaluation_setting(run: Run, plans: Iterable[Plan]) -> EvaluationSetting:
    """The setting in which `evaluate` measures these plans."""
    from .calibrate import calibration_question

    c = run.config
    learnt = c.reconstruct.order != "none"
    schemes = {s for plan in plans for s in plan.schemes}
    return setting_of(
        run,
        "evaluate",
        bins=run.bins,
        reconstruct=c.reconstruct.model_dump() if learnt else {},
        **calibration_question(run, schemes, always=learnt),
    )


def evaluate(run: Run, graph: OpGraph, plan: Plan) -> list[dict[str, Any]]:
    """Measure the plan and those beside it, as far as they were not measured before.

    Args:
        run: the run; `config.evaluate` says what is measured.
        graph: the model's graph.
        plan: the run's plan.

    Returns:
        A row a plan, as in results.json: name, size, metrics with standard errors.
    """
    from ..core.trials import Trials
    from ..report.pictures import picture_path, pictures_of

    check_ranges(run, plan)
    c = run.config
    plans = _plans(run, graph, plan)
    setting = evaluation_setting(run, plans.values())
    trials = Trials(run.path("trials.db"), graph)
    trials.describe(setting.key, setting.said)
    found = {name: trials.find(p, setting.key) for name, p in plans.items()}
    missing = [
        name
        for name, trial in found.items()
        if trial is None
        or pictures_of(picture_path(run.folder, name)) != f"{plans[name].id} {setting.key}"
    ]
    if missing:
        for warning in too_few(run.metrics, run.samples):
            run.progress.say(f"evaluate: {warning}")
        _measure(run, graph, plans, missing, setting, trials)
        found = {name: trials.find(p, setting.key) for name, p in plans.items()}
    else:
        run.progress.say("evaluate: every plan was measured before")
    rows = [_row(name, plans[name], trial) for name, trial in found.items() if trial is not None]
    key = digest([setting.key, rows])
    if file_key(run.path("results.json"), RESULTS) != key:
        header = Header(RESULTS, graph=graph.id, key=key, parents={"plan": plan.id}, seed=c.seed)
        write_json(run.path("results.json"), header, {"rows": rows})
    if c.protocol is not None:
        files = write_tables(run, rows)
        run.progress.say(f"evaluate: {c.protocol.name}'s table in {', '.join(map(str, files))}")
    say_evaluated(run, plan, rows, OWN)
    return rows


def results_of(run: Run, graph: OpGraph, plan: Plan) -> list[dict[str, Any]]:
    """The rows of results.json, measured of this plan.

    Args:
        run: the run.
        graph: the model's graph.
        plan: the run's plan.

    Returns:
        A row a plan, as `evaluate` returns them.

    Raises:
        QSearchError: nothing was measured, or another plan was; with the command that measures it.
    """
    path = run.path("results.json")
    command = f"`qsearch evaluate {run.folder}`"
    if not path.is_file():
        raise QSearchError(f"{path} does not exist; measure the plan with {command}")
    header, content = read_json(path, RESULTS, graph.id)
    if header.parents.get("plan", plan.id) != plan.id:
        raise QSearchError(
            f"{path} is of another plan than {run.path('plan.json')}; measure this one with "
            f"{command}"
        )
    return list(content["rows"])


def too_few(metrics: Iterable[str], samples: int) -> list[str]:
    """What metrics say of a number of samples that is too small for them, by their `warn`."""
    known = [plugins.load("metrics", m) for m in metrics if m in plugins.names("metrics")]
    said = [m.warn(samples) for m in known if hasattr(m, "warn")]
    return [text for text in said if text]


def _plans(run: Run, graph: OpGraph, plan: Plan) -> dict[str, Plan]:
    """Name -> plan, in the order of the table."""
    from ..decide.allocation import random_plan
    from .plans import sized, with_attentions, with_inputs

    c = run.config
    plans = {FULL_PRECISION: Plan.uniform(graph, KEEP)}
    if c.evaluate.uniform is not None:
        plans[f"uniform {c.evaluate.uniform}"] = Plan.uniform(graph, c.evaluate.uniform)
    plans[OWN] = plan
    many = c.evaluate.random > 1
    for i in range(0 if c.allocate.layers else c.evaluate.random):  # by hand fills no budget
        budget = sized(plan.budget or c.allocate.budget, plan)
        drawn = random_plan(graph, run.offered(graph), budget, c.seed * 1000 + i)
        drawn = with_attentions(graph, with_inputs(graph, drawn, c.allocate.inputs), plan)
        plans[f"random {i}" if many else "random"] = drawn
    return plans


def _row(name: str, plan: Plan, trial: Trial) -> dict[str, Any]:
    return {
        "plan": name,
        "average_bits": plan.achieved.average_bits,
        "bytes": plan.achieved.bytes,
        "metrics": {k: list(v) for k, v in trial.metrics.items()},
        "samples": {k: [round(x, 6) for x in v] for k, v in trial.samples.items()},
    }


def _measure(
    run: Run,
    graph: OpGraph,
    plans: Mapping[str, Plan],
    missing: Sequence[str],
    setting: EvaluationSetting,
    trials: Trials,
) -> None:
    from ..measure.evaluation import directions, evaluated, make
    from ..measure.pipelines import record_sampling
    from ..report.pictures import picture_path, save_pictures
    from .calibrate import calibration_calls, plan_weights, weights_together

    begin(run, "evaluate")
    prompts, sampling = setting.prompts, setting.sampling
    first = prompts[: min(_CALLS, len(prompts))]
    todo = [n for n in missing if n != FULL_PRECISION]
    choosing = calibration_calls(run, graph, {s for name in todo for s in plans[name].schemes})
    learnt = {OWN} if run.config.reconstruct.order != "none" else set[str]()
    together = [plans[n] for n in todo if n not in learnt]
    with run.ticks("evaluate", len(prompts), sampling.batch, 1 + len(todo)):
        calls, sampled = record_sampling(run.pipe, first, sampling, run.bins, sampling.batch)
        reference = replace(
            make(run.pipe, graph, plans[FULL_PRECISION], prompts, sampling, calls, sampled=sampled),
            real=setting.real,
        )
        shared = weights_together(run, graph, together, choosing)
        for name in [FULL_PRECISION, *todo]:
            plan, outcome = plans[name], reference
            if name != FULL_PRECISION:
                weights = (
                    plan_weights(run, graph, plan, choosing, learn=True)
                    if name in learnt
                    else shared.fresh()  # what one plan stores is freed before the next
                )
                outcome = make(run.pipe, graph, plan, prompts, sampling, calls, weights=weights)
            if trials.find(plan, setting.key) is None:
                pairs, samples = evaluated(outcome, reference, setting.metrics)
                trials.add(
                    name,
                    plan,
                    pairs,
                    setting.key,
                    samples=samples,
                    higher_is_better=directions([*setting.metrics, "noise"]),
                )
            save_pictures(
                picture_path(run.folder, name), outcome.pictures, of=f"{plan.id} {setting.key}"
            )
