"""fit(studies, metric) -> Surrogate: learns from measured plans, and says by grouped
cross-validation how well it predicts plans it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core import plugins
from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.scheme import KEEP
from ..core.sites import is_site
from ..core.table import SensitivityTable
from ..core.trials import Trial
from .data import AbstractModel, Data
from .features import Array, featurize
from .options import FOLDS, KIND
from .scores import Scores, linked, score, unlinked
from .surrogate import Surrogate, assemble

#: plans that share more than this part of their choices are kept on the same side of a split
_ALIKE = 0.8
_AT_ONCE = 512  # plans that are compared with all others at once


@dataclass(frozen=True)
class Study:
    """Measured plans of one graph, and the tables that priced its choices."""

    graph: OpGraph
    trials: Sequence[Trial]
    tables: Sequence[SensitivityTable] = ()

    def plans(self) -> dict[str, Plan]:
        """The plans by their digests.

        Returns:
            digest -> plan.

        Raises:
            QSearchError: a plan lacks a layer.
        """
        return {trial.plan: trial.made(self.graph) for trial in self.trials}

    def named(self) -> dict[str, Plan]:
        """The plans by their names; of several with one name, the later ones also by their digests.

        Returns:
            name -> plan.
        """
        found: dict[str, Plan] = {}
        for trial in self.trials:
            name = f"{trial.name} {trial.plan}" if trial.name in found else trial.name
            found[name] = trial.made(self.graph)
        return found

    def target(self, metric: str) -> Array:
        """What was measured of each plan [plans].

        Args:
            metric: one that was measured.

        Returns:
            Its mean over the samples, a number a plan.
        """
        for trial in self.trials:
            if metric not in trial.metrics:
                raise QSearchError(
                    f"{metric} was not measured of plan "
                    f"{trial.name}{nearest(metric, trial.metrics)}"
                )
        return np.array([trial.metrics[metric][0] for trial in self.trials])


@dataclass(frozen=True)
class TrainingSet:
    """Everything that a learner of this kind needs of one or more studies. `target`: as learnt, see
    `scores.linked`. `groups`: plans of one number stay together; `homes`: of which graph each plan
    is.
    """

    data: Data
    target: Array
    groups: NDArray[np.int64]
    homes: NDArray[np.int64]


def training_set(studies: Sequence[Study], metric: str, kind: str) -> TrainingSet:
    """Studies put together. Raises `QSearchError` where they have no columns in common, or the
    metric was not measured.
    """
    if not studies:
        raise QSearchError("a surrogate learns from measured plans; given no study")
    plugins.check("surrogates", kind)
    plans = [study.plans() for study in studies]
    found = [featurize(s.graph, p, s.tables) for s, p in zip(studies, plans, strict=True)]
    columns = [c for c in found[0].columns if all(c in f.columns for f in found)]
    parts = [
        assemble(kind, s.graph, p, s.tables, columns, f)
        for s, p, f in zip(studies, plans, found, strict=True)
    ]
    data = Data(
        tuple(columns),
        np.concatenate([d.values for d in parts]),
        tuple(n for d in parts for n in d.nodes),
    )
    groups: list[NDArray[np.int64]] = []
    for study in studies:
        groups.append(_alike(study) + (int(groups[-1].max()) + 1 if groups else 0))
    homes = np.concatenate([np.full(len(d), i) for i, d in enumerate(parts)])
    target = linked(metric, np.concatenate([s.target(metric) for s in studies]))
    return TrainingSet(data, target, np.concatenate(groups), homes)


def _alike(study: Study) -> NDArray[np.int64]:
    """A number for each plan, the same for plans that are nearly the same (as drawn around one
    frontier's plan).

    Equal choices of two plans are counted by a product of matrices, some plans at a time: ten
    thousand plans have fifty million pairs.
    """
    names = dict.fromkeys(layer.name for layer in study.graph.quantizable)
    names |= dict.fromkeys(name for t in study.trials for name in t.choices if is_site(name))
    columns = [np.unique([_words(t, n) for t in study.trials], return_inverse=True) for n in names]
    chosen = np.concatenate(
        [np.eye(len(words), dtype=np.float32)[places] for words, places in columns], axis=1
    )
    labels = np.arange(len(chosen))
    for begin in range(0, len(chosen), _AT_ONCE):
        counts = chosen[begin : begin + _AT_ONCE] @ chosen.T
        for near in counts.astype(np.float64) / len(names) > _ALIKE:
            met = np.unique(labels[near])
            if len(met) > 1:
                labels[np.isin(labels, met)] = met[0]
    return np.asarray(np.unique(labels, return_inverse=True)[1], np.int64)


def _words(trial: Trial, site: str) -> str:
    """What a measured plan says of a site, as one string."""
    held = trial.choices.get(site, (KEEP,))
    return " | ".join(str(s) for s in held) + (f" {trial.steps}" if len(held) > 1 else "")


#: (known rows, asked rows) of a fold
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
#: does the folds of a training set anywhere: (place of the fold, predictions), in any order
Elsewhere = Callable[["Folds"], Iterable[tuple[int, Array]]]


@dataclass(frozen=True)
class Folds:
    """A training set, the learner's kind and seed, and the folds of a cross-validation."""

    taken: TrainingSet
    kind: str
    seed: int
    splits: tuple[Fold, ...]

    def __call__(self, place: int) -> Array:
        """Predictions for the asked rows of the fold at that place."""
        known, asked = self.splits[place]
        data, fit_ = self.taken.data, plugins.load("surrogates", self.kind).fit
        model: AbstractModel = fit_(data.rows(known), self.taken.target[known], self.seed)
        return model.predict(data.rows(asked))


def cross_validate(
    taken: TrainingSet,
    kind: str,
    *,
    folds: int = FOLDS,
    seed: int = 0,
    by: str = "plan",
    elsewhere: Elsewhere | None = None,
) -> Array:
    """Held-out predictions [plans]: of `folds` parts each is predicted by what the others taught;
    `by` "graph": each graph by the other graphs.

    `elsewhere`: does the folds; one after the other here when left out.
    """
    from sklearn.model_selection import GroupKFold

    if by == "graph":
        if len(set(taken.homes)) < 2:
            raise QSearchError("leaving a graph out needs studies of two graphs or more; given one")
        splits = [
            (np.flatnonzero(taken.homes != home), np.flatnonzero(taken.homes == home))
            for home in sorted(set(taken.homes))
        ]
    elif by == "plan":
        count = len(set(taken.groups))
        if count < folds:
            raise QSearchError(
                f"{folds} folds need {folds} plans that differ; given {count} of "
                f"{len(taken.target)}: measure more, or ask for fewer folds"
            )
        splits = list(
            GroupKFold(folds, shuffle=True, random_state=seed).split(
                taken.target, groups=taken.groups
            )
        )
    else:
        raise QSearchError(f"plans are held out by plan or by graph; given {by!r}")
    work = Folds(taken, kind, seed, tuple(splits))
    out = np.full(len(taken.target), np.nan)
    places = range(len(splits))
    for place, found in elsewhere(work) if elsewhere else ((i, work(i)) for i in places):
        out[work.splits[place][1]] = found
    return out


def fit(
    graph: OpGraph | None = None,
    trials: Sequence[Trial] = (),
    tables: Sequence[SensitivityTable] | SensitivityTable = (),
    *,
    metric: str = "sqnr",
    kind: str = KIND,
    folds: int = FOLDS,
    seed: int = 0,
    studies: Sequence[Study] = (),
    elsewhere: Elsewhere | None = None,
) -> Surrogate:
    """A surrogate of `metric`, fitted on all plans: of one graph, or of several `studies`.

    Args:
        graph: the model's graph.
        trials: measured plans.
        tables: sensitivity tables of the graph; their predictions are features, and the one that
            goes along best is what learners start from.
        metric: what is learnt.
        kind: plug-in of `qsearch list surrogates`.
        folds: of the cross-validation.
        seed: of its folds and of learners that draw.
        studies: several graphs, in place of the first three.
        elsewhere: does the folds of the cross-validation (`cross_validate`).

    Returns:
        The surrogate, with its scores from cross-validation inside.

    Raises:
        QSearchError: trials of another graph, a metric that never varies, fewer plans than folds.
    """
    given = (tables,) if isinstance(tables, SensitivityTable) else tuple(tables)
    known = [*studies, *([Study(graph, trials, given)] if graph is not None else [])]
    taken = training_set(known, metric, kind)
    _varies(unlinked(metric, taken.target), metric)
    held = cross_validate(taken, kind, folds=folds, seed=seed, elsewhere=elsewhere)
    scores: Scores = score(
        unlinked(metric, held),
        unlinked(metric, taken.target),
        lower_is_better=metric_words(metric).lower_is_better,
    )
    model: AbstractModel = plugins.load("surrogates", kind).fit(taken.data, taken.target, seed)
    schemes = sorted(
        {str(s) for study in known for t in study.trials for s in t.schemes} - {"keep"}
    )
    graphs = {study.graph.id: study.graph.model for study in known}
    return Surrogate(
        kind,
        metric,
        taken.data.columns,
        graphs,
        tuple(schemes),
        scores,
        residuals=taken.target - held,
        model=model,
        seed=seed,
    )


def _varies(target: Array, metric: str) -> None:
    if not np.isfinite(target).all():
        raise QSearchError(
            f"{metric} is not finite for {int((~np.isfinite(target)).sum())} plans; leave "
            "them out or measure them again"
        )
    if len(target) > 0 and float(np.ptp(target)) == 0.0:
        raise QSearchError(
            f"a metric that never varies teaches nothing; {metric} is {target[0]:g} for "
            f"all {len(target)} plans: measure coarser plans"
        )


def by_graph(
    studies: Mapping[str, Study], metric: str, kind: str, *, seed: int = 0
) -> dict[str, Scores]:
    """name of a study -> scores of its plans predicted from the other studies alone."""
    taken = training_set(list(studies.values()), metric, kind)
    held = cross_validate(taken, kind, seed=seed, by="graph")
    lower = metric_words(metric).lower_is_better
    return {
        name: score(held[taken.homes == i], taken.target[taken.homes == i], lower_is_better=lower)
        for i, name in enumerate(studies)
    }
