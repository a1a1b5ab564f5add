"""A config end to end: extract, profile, allocate, evaluate, report; what has not changed is not done again.

Every artefact carries the key of the question it answers (settings, parents, the model's own bytes). A stage whose artefact has the
wanted key is skipped; a killed run starts again at the stage it was in, and within the sweep and the evaluation at the next item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config as configs
from .config import Config
from .core.artifacts import Header, digest, read_json, write_json
from .core.errors import ArtifactError, QSearchError
from .core.graph import OpGraph
from .core.plan import BitPlan
from .core.scheme import Scheme
from .core.table import SensitivityTable
from .decide.building import check_budget
from .job import Progress, Run, Silent
from .planning import plan_by_hand

if TYPE_CHECKING:
    from .measure.pipelines import Call
    from .measure.simulation import QuantizedWeights

RESULTS = "qsearch.results/1"
_PARTIAL = "sensitivity.partial.parquet"
_RELIABLE = 0.5  # less than this share of a ranking's variance between layers is real: say so
_EVALUATION_CALLS = 16  # prompts on which the denoiser's own output is compared


def extract(run: Run) -> OpGraph:
    """The model's graph, in graph.json."""
    key = run.key("extract", model=run.fingerprint)
    known: OpGraph | None = run.found("graph.json", key, OpGraph.load)
    if known is not None:
        run.progress.say("extract: graph.json is up to date")
        return known
    from .graphs.extraction import extract as verb
    from .measure.pipelines import denoiser_of, example_inputs, record

    [call] = record(
        run.pipe, run.prompts(1, part=0), replace(run.sampling, steps=2, batch=1), bins=1
    )  # PixArt treats one step as a distilled model
    model = denoiser_of(run.pipe)
    graph = verb(model, example_inputs(call, model), name=run.config.model)
    graph.save(run.path("graph.json"), key=key)
    run.progress.say(_extracted(graph))
    return graph


def extract_to(
    folder: Path, model: str, progress: Progress | None = None, **size: int | None
) -> OpGraph:
    """A run folder with the graph of `model`: a pipeline's, or a card's at a `resolution`, `batch` and number of `frames` of one's own."""
    from .graphs.families import cards

    job = Run(Config(model=model, folder=folder), progress or Silent())
    asked = {name: value for name, value in size.items() if value is not None}
    if not cards.has(model):
        _ = job.model_folder  # a wrong name is said before anything is written
        if asked:
            raise QSearchError(
                f"{', '.join(asked)} are for cards, a pipeline is read as it runs; given with {model}"
            )
        configs.save(job.config, job.path("config.yaml"))
        return extract(job)
    from .graphs.extraction import extract as verb

    denoiser, inputs = cards.load(model, **asked)
    graph = verb(denoiser, inputs, name=model)
    configs.save(job.config, job.path("config.yaml"))
    graph.save(
        job.path("graph.json"),
        key=digest({"verb": "extract", "card": cards.card(model).model_dump(mode="json"), **asked}),
    )
    job.progress.say(_extracted(graph))
    return graph


def _extracted(graph: OpGraph) -> str:
    return f"extract: {len(graph.layers)} layers, {graph.weights:,} weights, {graph.total_macs / 1e6:,.1f} M multiply-accumulates a call"


def profile(run: Run, graph: OpGraph) -> SensitivityTable:
    """The sensitivity of every layer to every scheme, in sensitivity.parquet."""
    c = run.config
    asked = {
        "seed": c.seed,
        "prompts": _text(c.prompts),
        "sampling": c.sampling.model_dump(),
        **c.profile.model_dump(exclude={"budget_seconds"}),
    }
    asked["calibrate"] = c.calibrate.model_dump()
    whole = run.key("profile", graph=graph.id, model=run.fingerprint, **asked)
    key = whole if c.profile.budget_seconds is None else digest([whole, c.profile.budget_seconds])
    known: SensitivityTable | None = run.found(
        "sensitivity.parquet", key, lambda path: SensitivityTable.load(path, graph.id)
    )
    if known is not None:
        run.progress.say("profile: sensitivity.parquet is up to date")
        return known
    from .measure.profiling import profile_pipeline as verb

    with ExitStack() as stack:
        seen, advance = 0, None

        def step(done: int, total: int) -> None:
            nonlocal seen, advance
            advance = advance or stack.enter_context(run.progress.track("profile", total))
            advance(done - seen)
            seen = done

        settings = c.profile.model_dump(exclude={"schemes", "samples"}) | {
            "seed": c.seed,
            "key": whole,
            "progress": step,
            "say": run.progress.say,
        }
        prompts = run.prompts(c.profile.samples, part=0)
        calibration = calibration_calls(run, [Scheme.parse(s) for s in c.profile.schemes])
        table = verb(
            run.pipe,
            graph,
            c.profile.schemes,
            prompts,
            run.sampling,
            partial=run.path(_PARTIAL),
            calibration=calibration,
            **settings,
        )
    table.save(run.path("sensitivity.parquet"), key=key, parents={"graph": graph.id}, seed=c.seed)
    if c.profile.budget_seconds is None:  # else it is what more time goes on from
        run.path(_PARTIAL).unlink(missing_ok=True)
    run.progress.say(
        f"profile: {len(table.frame):,} measurements, {len(table.at_floor())} of them at the measurement floor"
    )
    for metric in table.metrics:
        if (reliability := table.reliability(metric)) < _RELIABLE:
            run.progress.say(
                f"profile: the ranking by {metric} is mostly noise (reliability {reliability:.2f}); take more probes or samples"
            )
    return table


def calibration_calls(run: Run, schemes: Iterable[Scheme]) -> list[Call]:
    """Recorded calls for schemes that choose by them, with other noise than profiling and evaluation; none where none does."""
    from .measure.pipelines import record
    from .measure.treatment import needs_inputs

    c = run.config.calibrate
    if run.config.reconstruct.order == "none" and not any(needs_inputs(s) for s in schemes):
        return []
    sampling = replace(run.sampling, seed=run.sampling.seed + 250_000)
    return record(
        run.pipe,
        run.prompts(c.samples or run.config.profile.samples, part=0),
        sampling,
        min(c.bins, sampling.steps),
        c.batch,
    )


def plan_weights(
    run: Run, graph: OpGraph, plan: BitPlan, calls: Sequence[Call], *, learn: bool
) -> QuantizedWeights:
    """What `simulate` needs for a plan: calibrated on `calls`, and with `learn` reconstructed as the config says."""
    from .measure.pipelines import denoiser_of
    from .measure.reconstruction import reconstruct
    from .measure.simulation import calibrated_weights

    model, c = denoiser_of(run.pipe), run.config.reconstruct
    if learn and c.order != "none":
        return reconstruct(
            model,
            graph,
            plan,
            calls,
            order=c.order,
            steps=c.steps,
            rates=(c.rate, c.input_rate),
            seed=run.config.seed,
        ).weights
    return calibrated_weights(model, graph, {layer: [s] for layer, s in plan.layers.items()}, calls)


def allocate(run: Run, graph: OpGraph, table: SensitivityTable) -> BitPlan:
    """The best plan within the budget, in plan.json."""
    c = run.config.allocate
    parent = _content_key(table)
    refined = (
        {
            "refined": [
                run.fingerprint,
                run.config.sampling.model_dump(),
                run.config.profile.model_dump(),
            ]
        }
        if c.refine
        else {}
    )
    key = run.key(
        "allocate",
        table=parent,
        timed=_text(Path(c.device)) if c.device else "",
        **refined,
        **c.model_dump(),
    )
    known: BitPlan | None = run.found("plan.json", key, lambda path: BitPlan.load(path, graph))
    if known is not None:
        run.progress.say("allocate: plan.json is up to date")
        return known
    from .planning import make_plan

    plan = make_plan(c, graph, table)
    if c.refine:
        plan = _refine(run, graph, table, plan)
    plan.save(run.path("plan.json"), key=key, parents={"table": parent}, seed=run.config.seed)
    run.progress.say(
        f"allocate: {plan.achieved.average_bits:.3f} stored bits a weight, {plan.solver.name} says {plan.solver.status} in {plan.solver.seconds:.2f} s"
    )
    return plan


def _refine(run: Run, graph: OpGraph, table: SensitivityTable, plan: BitPlan) -> BitPlan:
    from .decide.refinement import refine
    from .measure.pipelines import denoiser_of, record
    from .planning import constraints_of, latency_of

    c = run.config
    calls = record(
        run.pipe,
        run.prompts(c.profile.samples, part=0),
        run.sampling,
        c.profile.bins,
        c.profile.batch,
    )
    rules: dict[str, Any] = {
        "constraints": constraints_of(c.allocate, graph, table),
        "latency": latency_of(c.allocate, graph, table),
    }
    found = refine(
        denoiser_of(run.pipe),
        graph,
        plan,
        c.profile.schemes,
        calls,
        rounds=c.allocate.refine,
        seed=c.seed,
        **rules,
    )
    kept = sum(r.kept for r in found.rounds)
    run.progress.say(
        f"allocate: refined, {kept} of {len(found.rounds)} rounds kept; noise power {found.before:.3g} before, {found.noise:.3g} after"
    )
    return found.plan


def frontier(run: Run, graph: OpGraph, table: SensitivityTable) -> list[BitPlan]:
    """A plan for every quarter of a bit from 2.5 to 8, in frontier/ and drawn in frontier.svg."""
    from .planning import save_frontier

    plans = save_frontier(run.folder, run.config.allocate, graph, table)
    first, last = plans[0].achieved.average_bits, plans[-1].achieved.average_bits
    run.progress.say(
        f"allocate: {len(plans)} plans from {first:.2f} to {last:.2f} stored bits a weight in {run.path('frontier')}, drawn in frontier.svg"
    )
    return plans


def evaluate(run: Run, graph: OpGraph, plan: BitPlan) -> list[dict[str, Any]]:
    """Full precision, uniform, the plan and random plans of its size, measured with common noise: trials.db and results.json."""
    from .core.scheme import KEEP
    from .core.trials import Trials
    from .decide.allocation import random_plan
    from .planning import sized, with_inputs
    from .report.pictures import picture_path, pictures_of

    c = run.config
    plans = {"full precision": BitPlan.uniform(graph, KEEP)}
    if c.evaluate.uniform is not None:
        plans[f"uniform {c.evaluate.uniform}"] = BitPlan.uniform(graph, c.evaluate.uniform)
    plans["plan"] = plan
    for i in range(0 if c.allocate.layers else c.evaluate.random):  # a plan by hand fills no budget
        drawn = random_plan(
            graph, c.profile.schemes, sized(c.allocate.budget, plan), c.seed * 1000 + i
        )
        plans[f"random {i}" if c.evaluate.random > 1 else "random"] = with_inputs(
            graph, drawn, c.allocate.inputs
        )
    texts = digest(
        run.prompts(c.evaluate.samples, part=1).texts
    )  # of a file, those after the ones for profiling
    asked = {
        "seed": c.seed,
        "prompts": texts,
        "sampling": c.sampling.model_dump(),
        "bins": c.profile.bins,
    }
    asked |= {"calibrate": c.calibrate.model_dump(), "reconstruct": c.reconstruct.model_dump()}
    setting = run.key(
        "evaluate",
        model=run.fingerprint,
        samples=c.evaluate.samples,
        metrics=sorted(c.evaluate.metrics),
        **asked,
    )
    trials = Trials(run.path("trials.db"), graph)
    found = {name: trials.find(p, setting) for name, p in plans.items()}
    missing = [
        name
        for name, trial in found.items()
        if trial is None
        or pictures_of(picture_path(run.folder, name)) != f"{plans[name].id} {setting}"
    ]
    if missing:
        _measure(run, graph, plans, missing, setting, trials)
        found = {name: trials.find(p, setting) for name, p in plans.items()}
    else:
        run.progress.say("evaluate: every plan was measured before")
    rows: list[dict[str, Any]] = []
    for name, trial in found.items():
        assert trial is not None
        achieved = plans[name].achieved
        metrics = {k: list(v) for k, v in trial.metrics.items()}
        rows.append(
            {
                "plan": name,
                "average_bits": achieved.average_bits,
                "bytes": achieved.bytes,
                "metrics": metrics,
            }
        )
    key = digest([setting, rows])
    if _key_of(run.path("results.json")) != key:
        write_json(
            run.path("results.json"),
            Header(RESULTS, graph=graph.id, key=key, parents={"plan": plan.id}, seed=c.seed),
            {"rows": rows},
        )
    return rows


def _measure(
    run: Run,
    graph: OpGraph,
    plans: dict[str, BitPlan],
    missing: list[str],
    setting: str,
    trials: Any,
) -> None:
    from .measure.evaluation import evaluate as verb
    from .measure.evaluation import make
    from .measure.pipelines import record
    from .report.pictures import picture_path, save_pictures

    c = run.config
    prompts = run.prompts(c.evaluate.samples, part=1)
    sampling = replace(run.sampling, seed=run.sampling.seed + 500_000)
    calls = record(
        run.pipe, prompts[: min(_EVALUATION_CALLS, len(prompts))], sampling, c.profile.bins
    )
    todo = [n for n in missing if n != "full precision"]
    choosing = calibration_calls(run, {s for name in todo for s in plans[name].layers.values()})
    with run.progress.track("evaluate", len(prompts) * (1 + len(todo))) as advance:
        reference = make(
            run.pipe, graph, plans["full precision"], prompts, sampling, calls, progress=advance
        )
        for name in ["full precision", *todo]:
            outcome = reference
            if name != "full precision":
                weights = plan_weights(run, graph, plans[name], choosing, learn=name == "plan")
                outcome = make(
                    run.pipe,
                    graph,
                    plans[name],
                    prompts,
                    sampling,
                    calls,
                    weights=weights,
                    progress=advance,
                )
            if trials.find(plans[name], setting) is None:
                trials.add(name, plans[name], verb(outcome, reference, c.evaluate.metrics), setting)
            save_pictures(
                picture_path(run.folder, name), outcome.pictures, of=f"{plans[name].id} {setting}"
            )


def run(config: Config | Path | str, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The whole job for a config (or the path of one): returns the rows of the table that compares the plans."""
    job = Run(
        configs.load(Path(config)) if isinstance(config, str | Path) else config,
        progress or Silent(),
    )
    _ = job.model_folder  # a wrong name is said before anything is written
    configs.save(job.config, job.path("config.yaml"))
    graph = extract(job)
    section = job.config.allocate
    if section.layers:
        plan_by_hand(graph, section.layers)
    else:  # before minutes of work, not after
        check_budget(
            graph, section.budget, job.config.profile.schemes, constraints=section.constraints
        )
    table = profile(job, graph)
    plan = allocate(job, graph, table)
    rows = evaluate(job, graph, plan)
    report(job, graph, table, plan, rows)
    return rows


def report(
    run: Run, graph: OpGraph, table: SensitivityTable, plan: BitPlan, rows: list[dict[str, Any]]
) -> None:
    """contact_sheet.png and report.html."""
    from .planning import pictured
    from .report.page import is_current, write_report

    section, explained = run.config.allocate, run.path("attribution.parquet")
    asked = {
        "rows": rows,
        "config": run.config.model_dump(mode="json"),
        "explained": _text(explained) if explained.is_file() else "",
    }
    key = run.key("report", plan=plan.id, table=_content_key(table), **asked)
    if is_current(run.folder, key):
        run.progress.say("report: report.html is up to date")
        return
    captions = run.prompts(run.config.evaluate.samples, part=1).texts
    pictures = pictured(section, graph, table, plan, rows, explained, run.progress.say)
    write_report(
        run.folder, graph, table, plan, rows, captions, metric=section.metric, key=key, **pictures
    )
    run.progress.say(f"report: {run.path('report.html')}")


def _key_of(path: Path) -> str:
    try:
        return read_json(path, RESULTS)[0].key
    except ArtifactError:
        return ""


def _text(path: Path | None) -> str:
    return (
        ""
        if path is None
        else hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if path.is_file()
        else str(path)
    )


def _content_key(table: SensitivityTable) -> str:
    return digest(table.frame[["site", "scheme", "step", "metric", "estimate"]].to_dict("list"))
