"""Trials: every evaluated plan with its measured metrics, as an Optuna study on disk (`trials.db`).

An Optuna study is a file format others read (dashboards, samplers), takes several writers and any
SQLAlchemy URL. A trial is added whole when its measurement is finished, so a killed evaluation
leaves none that is half done.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import graph_name, redacted, versions
from .claims import LAPSE, Claims
from .cost import Choices
from .errors import ArtifactError, QSearchError
from .graph import OpGraph
from .plan import ONE_RANGE, Plan, plan_id, said
from .scheme import Scheme
from .steps import StepRanges
from .storage import Aims, connect, is_url, open_study, opened, patiently, place_of, reason

if TYPE_CHECKING:
    import optuna

#: name of the study; with metrics behind it (`sqnr+ noise-`: more or less is better) its values are
#: theirs
STUDY = "qsearch.trials/1"
_FAMILY = STUDY.partition("/")[0] + "/"
#: characters of an attribute's JSON beyond which it is stored in parts: a column of MySQL holds
#: 65,535 bytes, and quotes of a part are escaped once more
_LONG = 30_000


@dataclass(frozen=True)
class Trial:
    """One measured plan. `metrics`: name -> (mean, standard error); `setting`: digest of how it was
    measured.

    `samples`: metric -> its value for each sample, in the order of the captions, where the metric
    has one; `stopped`: stopped early before the last sample.
    """

    name: str
    choices: dict[str, Choices]
    metrics: dict[str, tuple[float, float]]
    setting: str
    average_bits: float
    plan: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    stopped: bool = False
    steps: StepRanges = ONE_RANGE

    def made(self, graph: OpGraph) -> Plan:
        """The plan that was measured, priced on `graph`."""
        return Plan.make(graph, self.choices, steps=self.steps)

    @property
    def schemes(self) -> set[Scheme]:
        """Every scheme that some site has in some range of steps."""
        return {scheme for held in self.choices.values() for scheme in held}


class Trials:
    """The study behind `trials.db` (a path) or a storage URL, for one graph."""

    def __init__(self, where: Path | str, graph: OpGraph) -> None:
        self.graph = graph
        self._studies = dict[Aims, Any]()
        #: for people: without the user and the password of a URL
        self._said: dict[str, dict[str, str]] = {}
        self.where = redacted(str(where)) if is_url(where) else where
        try:
            place = place_of(where)
            self._storage = opened(lambda: connect(place))
            others = self._other_versions()
            self._study = opened(lambda: open_study(self._storage, STUDY))
        # SQLAlchemy, SQLite and Optuna each have their own; all mean that this is no study of ours
        except Exception as error:
            raise ArtifactError(
                f"{self.where} can't be opened as an Optuna study ({reason(error)})"
            ) from None
        if others:
            raise ArtifactError(
                f"{self.where} holds {others[0]!r}, this qsearch reads and writes {STUDY!r}; give "
                "another storage, or take the version of qsearch that made it"
            )
        known = self._study.user_attrs.get("graph")
        if known is None:
            self._study.set_user_attr("graph", graph.id)
            self._study.set_user_attr("versions", versions())
        elif graph_name(known) != graph.id:
            raise ArtifactError(
                f"{self.where} holds trials of graph {known}, {graph.model} is graph "
                f"{graph.id}; give another file"
            )

    def add(
        self,
        name: str,
        plan: Plan,
        metrics: Mapping[str, tuple[float, float]],
        setting: str,
        *,
        samples: Mapping[str, Sequence[float]] | None = None,
        stopped: bool = False,
        higher_is_better: Mapping[str, bool] | None = None,
    ) -> None:
        """Store one measured plan.

        Args:
            name: of the plan.
            plan: the plan.
            metrics: name -> (mean, standard error).
            setting: digest of how it was measured.
            samples: metric -> its value for each sample.
            stopped: stopped early before the last sample.
            higher_is_better: metric -> its direction; these metrics are the trial's values, for
                samplers and dashboards.

        Raises:
            QSearchError: for a plan of another graph or a metric that is not a number.
        """
        import optuna

        if plan.graph != self.graph.id:
            raise QSearchError(
                f"the plan is for graph {plan.graph}, the trials are of graph {self.graph.id}"
            )
        for metric, pair in metrics.items():
            if any(math.isnan(x) for x in pair):
                raise QSearchError(f"{metric} of plan {name} is not a number; it is not stored")
        aims = tuple(sorted((m, up) for m, up in (higher_is_better or {}).items() if m in metrics))
        values = [metrics[m][0] for m, _ in aims] or [metrics.get("noise", (0.0, 0.0))[0]]
        made = optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE,
            values=values,
            user_attrs=_in_parts(
                {
                    "name": name,
                    "plan": plan.id,
                    "setting": setting,
                    "average_bits": plan.achieved.average_bits,
                    "bytes": plan.achieved.bytes,
                    "schemes": _counted(plan),
                    "settings": dict(self._said.get(setting, {})),
                    "choices": said(plan.choices),
                    "steps": plan.steps.content(),
                    "metrics": {k: list(v) for k, v in metrics.items()},
                    "samples": {
                        k: [round(float(x), 6) for x in v] for k, v in (samples or {}).items()
                    },
                    "stopped": stopped,
                }
            ),
        )

        def add(attempt: int) -> None:
            if not attempt or not self.knows(plan.id, setting, stopped=stopped):
                self._study_of(aims).add_trial(made)

        try:
            patiently(add)
        except Exception as error:
            raise ArtifactError(
                f"{name} can't be stored in {self.where} ({reason(error)})"
            ) from None

    def claims(self, lapse: float = LAPSE) -> Claims:
        """Who measures which plan right now.

        Args:
            lapse: seconds after which a claim that was not renewed is free.

        Returns:
            The claims of the same storage.
        """
        return Claims(self._storage, lapse)

    def knows(self, plan: str, setting: str, *, stopped: bool) -> bool:
        """Whether a plan, by its digest, was measured in a setting.

        Args:
            plan: digest of the plan.
            setting: digest of how it is measured.
            stopped: whether a plan that was stopped early counts.

        Returns:
            Whether there is a trial.
        """
        return any(
            t.user_attrs.get("plan") == plan
            and t.user_attrs.get("setting") == setting
            and (stopped or not t.user_attrs.get("stopped", False))
            for t in patiently(lambda _: self._finished())
        )

    def describe(self, setting: str, said: Mapping[str, str]) -> None:
        """What a setting is in words, for people who look at the trials that are added from here
        on.

        Args:
            setting: digest of how plans are measured.
            said: name -> value, as text.
        """
        self._said[setting] = dict(said)

    def find(self, plan: Plan, setting: str) -> Trial | None:
        """The trial of this plan measured in this setting, or None.

        Args:
            plan: the plan.
            setting: digest of how it is measured.

        Returns:
            The trial with its metrics, or None.
        """
        wanted = plan.id
        for trial in reversed(self._stored()):
            a = _whole(trial.user_attrs)
            if "plan" not in a or a.get("setting") != setting:
                continue
            earlier = "choices" not in a  # a plan's id was another one then
            if a["plan"] == wanted or (earlier and _trial(trial, self.graph).plan == wanted):
                return _trial(trial, self.graph)
        return None

    def all(self) -> list[Trial]:
        """Every stored trial, oldest first.

        Returns:
            Trials of all settings.
        """
        return [_trial(t, self.graph) for t in self._stored() if "plan" in t.user_attrs]

    def measured(self, setting: str | None = None) -> list[Trial]:
        """The trials of one setting, each plan once (two workers may have measured it at the same
        time; whole before stopped early), in the order of their names.

        Without `setting`, that of the most trials.

        Args:
            setting: digest of how plans are measured.

        Returns:
            One trial a plan.

        Raises:
            QSearchError: there is no trial of the setting.
        """
        found = self.all()
        if not found:
            raise QSearchError(
                f"{self.where} holds no measured plan; measure some with `qsearch "
                "evaluate RUN --plans 64`"
            )
        counts = Counter(t.setting for t in found)
        wanted = setting or max(counts, key=counts.__getitem__)
        if wanted not in counts:
            raise QSearchError(
                f"{self.where} holds no plan measured in the setting {wanted}; it has "
                f"{', '.join(sorted(counts))}"
            )
        plans = {
            t.plan: t for t in sorted(found, key=lambda t: not t.stopped) if t.setting == wanted
        }
        return sorted(plans.values(), key=lambda t: t.name)

    def _study_of(self, aims: Aims) -> optuna.Study:
        """The study whose values are these metrics, made where there is none."""
        if not aims:
            return self._study
        if aims not in self._studies:
            name = " ".join([STUDY, *(f"{metric}{'+' if up else '-'}" for metric, up in aims)])
            self._studies[aims] = opened(lambda: open_study(self._storage, name, aims))
        found: optuna.Study = self._studies[aims]
        return found

    def _other_versions(self) -> list[str]:
        """Studies of trials that another version of qsearch wrote."""
        import optuna

        known = optuna.get_all_study_names(self._storage)
        return [n for n in known if n.startswith(_FAMILY) and n.split(" ")[0] != STUDY]

    def _finished(self) -> list[optuna.trial.FrozenTrial]:
        import optuna

        found = self._study.get_trials(deepcopy=False)
        for name in optuna.get_all_study_names(self._storage):
            if name.startswith(f"{STUDY} "):
                study = optuna.load_study(study_name=name, storage=self._storage)
                found += study.get_trials(deepcopy=False)
        return found

    def _stored(self) -> list[optuna.trial.FrozenTrial]:
        try:
            return sorted(self._finished(), key=_completed)
        except Exception as error:  # as when it is opened
            raise ArtifactError(
                f"{self.where} can't be read as an Optuna study ({reason(error)}); make "
                "it again with `qsearch evaluate`"
            ) from None


def _counted(plan: Plan) -> dict[str, int]:
    """Scheme -> how many layers have it (in the first range of steps), the most first."""
    return dict(Counter(str(held[0]) for held in plan.weights.values()).most_common())


def _in_parts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Long attributes as `KEY/0`, `KEY/1`, … that hold their JSON text one after the other."""
    stored = dict[str, Any]()
    for key, value in attributes.items():
        text = json.dumps(value)
        if len(text) <= _LONG:
            stored[key] = value
            continue
        for i, start in enumerate(range(0, len(text), _LONG)):
            stored[f"{key}/{i}"] = text[start : start + _LONG]
    return stored


def _whole(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What `_in_parts` was given."""
    whole, texts = dict[str, Any](), dict[str, dict[int, str]]()
    for name, value in stored.items():
        key, mark, number = name.partition("/")
        if mark:
            texts.setdefault(key, {})[int(number)] = value
        else:
            whole[key] = value
    for key, parts in texts.items():
        whole[key] = json.loads("".join(text for _, text in sorted(parts.items())))
    return whole


def _completed(trial: optuna.trial.FrozenTrial) -> float:
    return trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0


def _trial(trial: optuna.trial.FrozenTrial, graph: OpGraph) -> Trial:
    a = _whole(trial.user_attrs)
    given = a["choices"] if "choices" in a else a["layers"]  # the latter before there were ranges
    steps = StepRanges.parse(a.get("steps"))
    return Trial(
        a["name"],
        {k: tuple(map(Scheme.parse, [v] if isinstance(v, str) else v)) for k, v in given.items()},
        {k: (v[0], v[1]) for k, v in a["metrics"].items()},
        a["setting"],
        a["average_bits"],
        a["plan"] if "choices" in a else plan_id(graph.id, given, steps),
        {k: list(v) for k, v in a.get("samples", {}).items()},
        a.get("stopped", False),
        steps,
    )
