"""Trials: every evaluated plan with its measured metrics, as an Optuna study on disk (`trials.db`).

An Optuna study is a file format others read (dashboards, samplers), takes several writers and any SQLAlchemy URL. A trial is
added whole when its measurement is finished, so a killed evaluation leaves none that is half done.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .artifacts import versions
from .errors import ArtifactError, QSearchError
from .graph import OpGraph
from .plan import BitPlan
from .scheme import Scheme

if TYPE_CHECKING:
    import optuna

STUDY = "qsearch.trials/1"


@dataclass(frozen=True)
class Trial:
    """One measured plan. `metrics`: name -> (mean, standard error); `setting`: digest of how it was measured.

    `samples`: metric -> its value for each sample, in the order of the captions, where the metric has one; `stopped`: given up before the last sample.
    """

    name: str
    layers: dict[str, Scheme]
    metrics: dict[str, tuple[float, float]]
    setting: str
    average_bits: float
    plan: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    stopped: bool = False


class Trials:
    """The study behind `trials.db` (a path) or a storage URL, for one graph."""

    def __init__(self, where: Path | str, graph: OpGraph) -> None:
        self.graph = graph
        self.where = where
        url = (
            where
            if isinstance(where, str) and "://" in where
            else f"sqlite:///{Path(where).resolve()}"
        )
        try:
            self._study = _open(url)
        except Exception as error:  # SQLAlchemy, SQLite and Optuna each have their own; all mean that this is no study of ours
            raise ArtifactError(
                f"{where} can't be opened as an Optuna study ({_reason(error)})"
            ) from error
        known = self._study.user_attrs.get("graph")
        if known is None:
            self._study.set_user_attr("graph", graph.id)
            self._study.set_user_attr("versions", versions())
        elif known != graph.id:
            raise ArtifactError(
                f"{where} holds trials of graph {known}, {graph.model} is graph {graph.id}; give another file"
            )

    def add(
        self,
        name: str,
        plan: BitPlan,
        metrics: Mapping[str, tuple[float, float]],
        setting: str,
        *,
        samples: Mapping[str, Sequence[float]] | None = None,
        stopped: bool = False,
    ) -> None:
        """Store one measured plan. Raises `QSearchError` for a plan of another graph or a metric that is not a number."""
        import optuna

        if plan.graph != self.graph.id:
            raise QSearchError(
                f"the plan is for graph {plan.graph}, the trials are of graph {self.graph.id}"
            )
        for metric, pair in metrics.items():
            if any(math.isnan(x) for x in pair):
                raise QSearchError(f"{metric} of plan {name} is not a number; it is not stored")
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE,
                value=metrics["noise"][0] if "noise" in metrics else 0.0,
                user_attrs={
                    "name": name,
                    "plan": plan.id,
                    "setting": setting,
                    "average_bits": plan.achieved.average_bits,
                    "layers": {k: str(v) for k, v in plan.layers.items()},
                    "metrics": {k: list(v) for k, v in metrics.items()},
                    "samples": {
                        k: [round(float(x), 6) for x in v] for k, v in (samples or {}).items()
                    },
                    "stopped": stopped,
                },
            )
        )

    def find(self, plan: BitPlan, setting: str) -> Trial | None:
        """The trial of this plan measured in this setting, or None."""
        for trial in reversed(self._stored()):
            if (
                trial.user_attrs.get("plan") == plan.id
                and trial.user_attrs.get("setting") == setting
            ):
                return _trial(trial)
        return None

    def all(self) -> list[Trial]:
        """Every stored trial, oldest first."""
        return [_trial(t) for t in self._stored() if "plan" in t.user_attrs]

    def measured(self, setting: str | None = None) -> list[Trial]:
        """The trials of one setting, each plan once (two workers may have measured it at the same time; whole before given up), in the order of their names.

        Without `setting`, that of the most trials. Raises `QSearchError` where there is none.
        """
        found = self.all()
        if not found:
            raise QSearchError(
                f"{self.where} holds no measured plan; measure some with `qsearch evaluate RUN --plans 64`"
            )
        counts = Counter(t.setting for t in found)
        wanted = setting or max(counts, key=counts.__getitem__)
        if wanted not in counts:
            raise QSearchError(
                f"{self.where} holds no plan measured in the setting {wanted}; it has {', '.join(sorted(counts))}"
            )
        plans = {
            t.plan: t for t in sorted(found, key=lambda t: not t.stopped) if t.setting == wanted
        }
        return sorted(plans.values(), key=lambda t: t.name)

    def _stored(self) -> list[optuna.trial.FrozenTrial]:
        try:
            return self._study.get_trials(deepcopy=False)
        except Exception as error:  # as when it is opened
            raise ArtifactError(
                f"{self.where} can't be read as an Optuna study ({_reason(error)}); make it again with `qsearch evaluate`"
            ) from error


def _open(url: str) -> optuna.Study:
    """The study at `url`, made where there is none.

    Optuna makes its tables without a lock, so of two processes that begin at the same moment one may fail: it tries again.
    It would make them in anybody's SQLite file, too, so we look first.
    """
    import optuna
    from sqlalchemy import NullPool, exc

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage: str | optuna.storages.RDBStorage = url
    for pause in (0.1, 0.4, 1.6, None):
        try:
            if url.startswith("sqlite:///"):
                _look(Path(url.removeprefix("sqlite:///")))
                # A minute's patience with another writer, and no connection held open between calls.
                storage = optuna.storages.RDBStorage(
                    url, engine_kwargs={"connect_args": {"timeout": 60}, "poolclass": NullPool}
                )
            return optuna.create_study(study_name=STUDY, storage=storage, load_if_exists=True)
        except (exc.IntegrityError, exc.OperationalError, optuna.exceptions.StorageInternalError):
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _look(path: Path) -> None:
    """Make the folder of a SQLite file; refuse a database with tables that are not Optuna's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with closing(sqlite3.connect(path)) as database:
            tables = {
                name
                for (name,) in database.execute(
                    "select name from sqlite_master where type = 'table'"
                )
            }
        if tables and not tables & {"studies", "version_info", "alembic_version"}:
            raise ValueError(f"it is a database with the tables {', '.join(sorted(tables)[:5])}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _trial(trial: optuna.trial.FrozenTrial) -> Trial:
    a = trial.user_attrs
    return Trial(
        a["name"],
        {k: Scheme.parse(v) for k, v in a["layers"].items()},
        {k: (v[0], v[1]) for k, v in a["metrics"].items()},
        a["setting"],
        a["average_bits"],
        a["plan"],
        {k: list(v) for k, v in a.get("samples", {}).items()},
        a.get("stopped", False),
    )
