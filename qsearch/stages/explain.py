"""explain: why a plan is predicted to be as it is, in attribution.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..core.attribution import Attribution
from ..core.plan import Plan
from ..core.settings import Settings
from ..learn.options import PAIRS
from .fit import study_of

if TYPE_CHECKING:
    from ..learn.surrogate import Surrogate
    from .folder import Run

#: measured plans whose features are explained beside the run's own plan
_SHOWN = 300
#: what the run's own plan is called among the explained ones
OWN = "plan"


class ExplainSettings(Settings):
    """What a plan is compared with, and how much of it is said."""

    baseline: str | None = Field(
        None, description="scheme of the uniform plan to compare with; full precision else"
    )
    pairs: int = Field(PAIRS, ge=0, description="strongest pairs of layers")
    top: int = Field(10, ge=1, description="layers shown for each metric")


def explain(
    run: Run,
    settings: ExplainSettings | None = None,
    *,
    plan: Path | None = None,
    storage: str | None = None,
) -> Attribution:
    """Values of layers, pairs and features that add up to the plan's prediction.

    Args:
        run: the run, with a table of probes, or surrogates.
        settings: of the run's config when left out.
        plan: the plan to explain; the run's own when left out.
        storage: URL of the trials, where they are not in the run.

    Returns:
        The attribution: of this plan by all that knows its schemes, and of measured plans by
        surrogates with columns.
    """
    from ..learn.explaining import explain as verb
    from ..learn.surrogate import Surrogate

    asked = settings or run.config.explain
    graph = run.graph()
    tables = run.tables(graph)
    base = None if asked.baseline is None else Plan.uniform(graph, asked.baseline)
    own = Plan.load(plan or run.path("plan.json"), graph)
    surrogates = [
        s
        for path in sorted(run.path("surrogate").glob("*/surrogate.json"))
        if _knows(run, s := Surrogate.load(path.parent, graph.id), own)
    ]
    found = verb(
        graph,
        {OWN: own},
        tables=tables,
        surrogates=surrogates,
        baseline=base,
        pairs=asked.pairs,
    )
    measured = _measured(run, storage, own) if surrogates else {}
    parts = [
        verb(graph, measured, tables=tables, surrogates=[s], layers=False)
        for s in surrogates
        if s.has_columns and measured
    ]
    found = Attribution.together([found, *parts])
    found.save(run.path("attribution.parquet"), parents={"plan": own.id}, seed=run.config.seed)
    return found


def _measured(run: Run, storage: str | None, own: Plan) -> Mapping[str, Plan]:
    """Measured plans by names that are not the own plan's, which is explained already."""
    named = study_of(run, storage).named()
    others = {
        f"{name} {plan.id[:6]}" if name == OWN else name: plan
        for name, plan in named.items()
        if plan.id != own.id or name != OWN
    }
    return dict(list(others.items())[:_SHOWN])


def _knows(run: Run, surrogate: Surrogate, plan: Plan) -> bool:
    unseen = sorted({str(s) for s in plan.schemes} - {*surrogate.schemes, "keep"})
    if unseen:
        run.progress.say(
            f"explain: the surrogate of {surrogate.metric} has never seen {unseen[0]} and is left "
            "out; measure plans with it and fit again"
        )
    return not unseen
