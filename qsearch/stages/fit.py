"""fit: surrogates that predict what was measured of plans, in surrogate/METRIC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..core.errors import QSearchError
from ..core.settings import Settings
from ..learn.options import FOLDS, KIND

if TYPE_CHECKING:
    from ..learn.fitting import Study
    from ..learn.surrogate import Surrogate
    from .folder import Run


class FitSettings(Settings):
    """What is predicted, by which learner, and how it is tested."""

    metrics: tuple[str, ...] = Field((), description="all that were measured when left out")
    surrogate: str = Field(KIND, description="plug-in of `qsearch list surrogates`")
    folds: int = Field(FOLDS, ge=2, description="parts of the cross-validation")


def fit(
    run: Run,
    settings: FitSettings | None = None,
    *,
    storage: str | None = None,
    also: Sequence[Path] = (),
) -> list[Surrogate]:
    """A surrogate for each metric.

    Args:
        run: the run, with measured plans.
        settings: of the run's config when left out.
        storage: URL of the trials, where they are not in the run.
        also: folders of other runs to learn from at once.

    Returns:
        The surrogates, each with its held-out scores.
    """
    from ..learn.fitting import fit as verb
    from .config import load
    from .folder import Run as Folder

    asked = settings or run.config.fit
    others = [Folder(load(folder).model_copy(update={"folder": folder})) for folder in also]
    studies = [study_of(run, storage), *(study_of(other) for other in others)]
    known = [
        name
        for name in studies[0].trials[0].metrics
        if all(name in s.trials[0].metrics for s in studies)
    ]
    found = []
    for metric in asked.metrics or known:
        surrogate = verb(
            metric=metric,
            kind=asked.surrogate,
            folds=asked.folds,
            seed=run.config.seed,
            studies=studies,
        )
        surrogate.save(run.path("surrogate"))
        found.append(surrogate)
    return found


def study_of(run: Run, storage: str | None = None) -> Study:
    """The measured plans of a run, with its graph and table."""
    from ..core.trials import Trials
    from ..learn.fitting import Study

    graph = run.graph()
    where = storage or run.path("trials.db")
    if storage is None and not run.path("trials.db").is_file():
        raise QSearchError(
            f"{run.folder} holds no measured plans; measure some with "
            f"`qsearch evaluate {run.folder} --plans 64`"
        )
    return Study(graph, Trials(where, graph).measured(), run.tables(graph))


def scores_of(surrogates: Sequence[Surrogate]) -> list[dict[str, Any]]:
    """Held-out scores, a row a metric."""
    from ..learn.scores import half_width

    return [
        {
            "metric": s.metric,
            "surrogate": s.kind,
            "plans": s.scores.plans,
            "SRCC": s.scores.spearman,
            "Kendall": s.scores.kendall,
            "NDCG@10": s.scores.ndcg,
            "error": s.scores.error,
            "90% interval ±": half_width(s.residuals, 0.9),
        }
        for s in surrogates
    ]
