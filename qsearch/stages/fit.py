"""fit: surrogates that predict what was measured of plans, in surrogate/METRIC."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..core.errors import QSearchError
from ..core.settings import Settings
from ..core.storage import storage_url
from ..learn.options import FOLDS, KIND

if TYPE_CHECKING:
    from ..learn.features import Array
    from ..learn.fitting import Folds, Study
    from ..learn.surrogate import Surrogate
    from ..measure.executing import ExecutorOptions
    from .folder import Run


#: plans that each fold holds out, at least; plans from which on scores say something; residuals
#: that a 90% interval needs
_EACH, _MANY, _PROMISED = 2, 30, 9


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
    by: ExecutorOptions | None = None,
) -> list[Surrogate]:
    """A surrogate for each metric.

    Args:
        run: the run, with measured plans.
        settings: of the run's config when left out.
        storage: URL of the trials, where they are not in the run.
        also: folders of other runs to learn from at once.
        by: executor and workers for the folds of the cross-validation; this process when left out.

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
    _enough(run, studies, asked.folds)
    found = []
    for metric in asked.metrics or known:
        surrogate = verb(
            metric=metric,
            kind=asked.surrogate,
            folds=asked.folds,
            seed=run.config.seed,
            studies=studies,
            elsewhere=None if by is None else partial(_folds, by, run.progress.say),
        )
        surrogate.save(run.path("surrogate"))
        found.append(surrogate)
    return found


def _folds(
    by: ExecutorOptions, say: Callable[[str], None], work: Folds
) -> Iterator[tuple[int, Array]]:
    """The folds of a cross-validation, by an executor's workers."""
    from ..measure.executing import Task, execute

    places = deque(range(len(work.splits)))
    return execute(Task(partial(_learner, work)), places, by, say)


def _learner(work: Folds, device: str) -> Folds:
    return work


def _enough(run: Run, studies: Sequence[Study], folds: int) -> None:
    """Refuse fewer plans than a held-out score can be taken of, and say where there are few."""
    count = sum(len(study.trials) for study in studies)
    if count < _EACH * folds:
        raise QSearchError(
            f"{folds} folds need {_EACH * folds} measured plans, so that each holds {_EACH} out; "
            f"{run.folder} has {count}: measure more with `qsearch evaluate {run.folder} --plans "
            "64`, or ask for fewer folds"
        )
    if count < _MANY:
        run.progress.say(
            f"fit: {count} plans are few; the scores below have wide errors of their own, and no "
            f"90% interval is promised for fewer than {_PROMISED}"
        )


def study_of(run: Run, storage: str | None = None) -> Study:
    """The measured plans of a run, with its graph and table."""
    from ..core.trials import Trials
    from ..learn.fitting import Study

    graph = run.graph()
    where = run.path("trials.db") if storage is None else storage_url(storage)
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
            "90% interval ±": width
            if math.isfinite(width := half_width(s.residuals, 0.9))
            else "-",
        }
        for s in surrogates
    ]
