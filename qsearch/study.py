"""From a run's folder to what is learnt in it: measure many plans, fit surrogates on them, explain a plan; trials.db, surrogate/, attribution.parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config as configs
from .core.artifacts import digest
from .core.attribution import Attribution
from .core.errors import QSearchError
from .core.graph import OpGraph
from .core.plan import BitPlan
from .core.table import SensitivityTable
from .core.trials import Trials
from .job import Run

if TYPE_CHECKING:
    from .learn.fitting import Study
    from .learn.surrogate import Surrogate

#: measured plans whose features are explained beside the run's own plan
_SHOWN = 300


def table_of(run: Run, graph: OpGraph) -> tuple[SensitivityTable, ...]:
    """The run's sensitivity table, or nothing where it was not profiled."""
    path = run.path("sensitivity.parquet")
    return (SensitivityTable.load(path, graph.id),) if path.is_file() else ()


def plans_in(path: Path, graph: OpGraph) -> dict[str, BitPlan]:
    """The plan of a file, or those of all `*.json` in a folder, by their names."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise QSearchError(
            f"{path} holds no plans; give a plan.json, or a folder of them such as RUN/frontier"
        )
    return {file.stem: BitPlan.load(file, graph) for file in files}


def measure(
    run: Run,
    graph: OpGraph,
    count: int,
    *,
    draw: str = "random",
    given: Path | None = None,
    workers: int = 1,
    storage: str | None = None,
    stop: Mapping[str, float] | None = None,
) -> int:
    """Measure `count` drawn plans of the run's schemes, or those `given`, into the trials; returns how many were measured now."""
    from .decide.draws import draw as draw_plans
    from .measure.campaign import Campaign, measure_plans

    c = run.config
    if given is not None:
        plans = plans_in(given, graph)
    else:
        tables = table_of(run, graph)
        plans = draw_plans(
            graph, c.profile.schemes, count, draw, seed=c.seed, table=tables[0] if tables else None
        )
    prompts, sampling = (
        run.prompts(c.evaluate.samples, part=1),
        replace(run.sampling, seed=run.sampling.seed + 500_000),
    )
    asked = {
        "seed": c.seed,
        "prompts": digest(prompts.texts),
        "sampling": c.sampling.model_dump(),
        "metrics": sorted(c.evaluate.metrics),
    }
    setting = run.key("campaign", graph=graph.id, model=run.fingerprint, **asked)
    where = storage or run.path("trials.db")
    campaign = Campaign(
        run.model_folder,
        graph,
        prompts,
        sampling,
        c.evaluate.metrics,
        setting,
        where,
        c.device,
        stop or {},
    )
    with run.progress.track("evaluate", len(plans)) as advance:
        done = measure_plans(
            campaign, plans, workers=workers, progress=advance, say=run.progress.say
        )
    run.progress.say(
        f"evaluate: {done} plans measured, {len(plans) - done} of {len(plans)} were there or passed over; all in {where}"
    )
    return done


def limits_of(asked: Sequence[str]) -> dict[str, float]:
    """`["sqnr=3"]` as metric -> value. Raises `QSearchError` for what is neither."""
    found = {}
    for text in asked:
        metric, _, value = text.partition("=")
        try:
            found[metric] = float(value)
        except ValueError:
            raise QSearchError(
                f"a plan is given up by METRIC=VALUE, e.g. sqnr=3; given {text!r}"
            ) from None
    return found


def study_of(run: Run, storage: str | None = None) -> Study:
    """The measured plans of a run, with its graph and table."""
    from .learn.fitting import Study

    graph = OpGraph.load(run.path("graph.json"))
    where = storage or run.path("trials.db")
    if storage is None and not run.path("trials.db").is_file():
        raise QSearchError(
            f"{run.folder} holds no measured plans; measure some with `qsearch evaluate {run.folder} --plans 64`"
        )
    return Study(graph, Trials(where, graph).measured(), table_of(run, graph))


def fit(
    run: Run,
    *,
    metrics: Sequence[str] = (),
    kind: str = "xgboost",
    folds: int = 5,
    storage: str | None = None,
    also: Sequence[Path] = (),
) -> list[Surrogate]:
    """A surrogate for each metric (all that were measured, when left out), in surrogate/METRIC. `also`: other runs to learn from at once."""
    from .learn.fitting import fit as verb

    studies = [
        study_of(run, storage),
        *(
            study_of(
                Run(configs.load(folder / "config.yaml").model_copy(update={"folder": folder}))
            )
            for folder in also
        ),
    ]
    known = [
        name
        for name in studies[0].trials[0].metrics
        if all(name in s.trials[0].metrics for s in studies)
    ]
    found = []
    for metric in metrics or known:
        surrogate = verb(
            metric=metric, kind=kind, folds=folds, seed=run.config.seed, studies=studies
        )
        surrogate.save(run.path("surrogate"))
        found.append(surrogate)
    return found


def explain(
    run: Run,
    *,
    plan: Path | None = None,
    baseline: str | None = None,
    pairs: int = 100,
    storage: str | None = None,
) -> Attribution:
    """Why a plan (the run's own, when left out) is predicted to be as it is, and what features do to all measured plans; in attribution.parquet."""
    from .learn.explaining import explain as verb
    from .learn.surrogate import Surrogate

    graph = OpGraph.load(run.path("graph.json"))
    tables = table_of(run, graph)
    surrogates = [
        Surrogate.load(path.parent, graph.id)
        for path in sorted(run.path("surrogate").glob("*/surrogate.json"))
    ]
    base = None if baseline is None else BitPlan.uniform(graph, baseline)
    own = BitPlan.load(plan or run.path("plan.json"), graph)
    found = verb(
        graph,
        {"plan": own},
        tables=tables,
        surrogates=[s for s in surrogates if _knows(run, s, own)],
        baseline=base,
        pairs=pairs,
    )
    measured = dict(list(study_of(run, storage).named().items())[:_SHOWN]) if surrogates else {}
    parts = [
        verb(graph, measured, tables=tables, surrogates=[s], layers=False)
        for s in surrogates
        if s.has_columns
    ]
    found = Attribution.together([found, *parts])
    found.save(run.path("attribution.parquet"), parents={"plan": own.id}, seed=run.config.seed)
    return found


def _knows(run: Run, surrogate: Surrogate, plan: BitPlan) -> bool:
    unseen = sorted({str(s) for s in plan.layers.values()} - {*surrogate.schemes, "keep"})
    if unseen:
        run.progress.say(
            f"explain: the surrogate of {surrogate.metric} has never seen {unseen[0]} and is left out; measure plans with it and fit again"
        )
    return not unseen


def rows_of(surrogates: Sequence[Surrogate]) -> list[dict[str, Any]]:
    """Held-out scores, a row a metric."""
    from .learn.scores import half_width

    rows = []
    for s in surrogates:
        scores = {
            "SRCC": s.scores.spearman,
            "Kendall": s.scores.kendall,
            "NDCG@10": s.scores.ndcg,
            "error": s.scores.error,
        }
        rows.append(
            {
                "metric": s.metric,
                "surrogate": s.kind,
                "plans": s.scores.plans,
                **scores,
                "90% interval ±": half_width(s.residuals, 0.9),
            }
        )
    return rows


def largest(found: Attribution, top: int) -> dict[str, list[dict[str, Any]]]:
    """Title -> the `top` names with the largest share in the prediction of the run's plan, for each method and metric that shares it out."""
    shown: dict[str, list[dict[str, Any]]] = {}
    rows = found.frame[
        (found.frame["plan"] == "plan") & found.frame["kind"].isin(["layer", "feature"])
    ]
    for (method, kind, metric), part in rows.groupby(["method", "kind", "metric"], sort=True):
        totals = part.groupby("name").agg({"value": "sum", "choice": "first"})
        order = totals["value"].abs().sort_values(ascending=False).index[:top]
        base, whole = float(part["base"].iloc[0]), float(part["prediction"].iloc[0])
        listed: list[dict[str, Any]] = [
            {
                str(kind): str(name),
                "choice": str(totals.loc[name, "choice"]),
                "value": float(totals.loc[name, "value"]),
            }
            for name in order
        ]
        shown[f"{metric} by {method}: {base:.4g} without, {whole:.4g} with this plan"] = listed
    return shown
