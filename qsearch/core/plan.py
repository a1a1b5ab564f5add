"""Plan: which choice each site has in each range of sampler steps, on disk as `plan.json`.

A site is a layer, or a tensor of an attention (`core/sites.py`). A site has one choice for all
steps, which is fitted once, or a choice for each range of steps, fitted on the calls of its own
range. Weights that differ between ranges are stored, and paid for, once each; what happens to
inputs and attentions costs nothing to store.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from . import cost as costs
from .artifacts import Header, digest, read_json, write_json
from .cost import Budget, Choices, Cost, can_have, check_budget, cost, stored_bits
from .errors import ArtifactError, QSearchError
from .graph import OpGraph
from .latency import Latency
from .plan_choices import checked
from .plan_version_1 import converted
from .scheme import FULL_BITS, KEEP, Scheme
from .sites import is_site
from .steps import StepRanges

SCHEMA = "qsearch.plan/2"
_EARLIER = ("qsearch.plan/1", "qsearch.stepplan/1")


@dataclass(frozen=True)
class Solver:
    """What the solver said: `status` (optimal, feasible, …), relative `gap`, `bound` on the
    objective, `seconds`.
    """

    name: str
    status: str
    gap: float | None = None
    bound: float | None = None
    objective: float | None = None
    seconds: float = 0.0


ONE_RANGE = StepRanges()
UNSOLVED = Solver("given", "unsolved")


@dataclass(frozen=True)
class Plan:
    """Choices for the sites of a graph. Build it with `Plan.make`, which prices it.

    Attributes:
        graph: id of the graph.
        choices: site -> one scheme, or one for each range of `steps`. Every layer is there (`keep`
            is explicit); sites of attention that are not kept.
        achieved: what it costs.
        steps: how the sampler's steps are cut; one range where no site has several choices.
    """

    graph: str
    choices: dict[str, Choices]
    achieved: Cost
    budget: Budget | None = None
    solver: Solver = UNSOLVED
    header: Header | None = field(default=None, compare=False)
    steps: StepRanges = ONE_RANGE

    @staticmethod
    def make(
        graph: OpGraph,
        choices: Mapping[str, Scheme | str | Sequence[Scheme | str]],
        budget: Budget | None = None,
        solver: Solver | None = None,
        *,
        steps: StepRanges | None = None,
        latency: Latency | None = None,
    ) -> Plan:
        """Price `choices` on `graph`.

        Args:
            graph: the model's graph.
            choices: site -> a scheme, or a list of them, one for each range of `steps`.
            budget: limits that the plan must keep.
            solver: what the solver said.
            steps: ranges of sampler steps, where some site has a list.
            latency: times, for the cost in seconds.

        Returns:
            The plan with its costs.

        Raises:
            QSearchError: an unknown site, a layer without a choice, a site with one that it can't
                have, a list of another length than there are ranges.
            InfeasibleBudget: the plan breaks `budget`.
        """
        ranges = steps or ONE_RANGE
        made = checked(graph, choices, ranges)
        for layer in graph:
            for scheme in made.get(layer.name, ()):
                if not layer.quantizable and scheme.format != "keep":
                    raise QSearchError(
                        f"{layer.name} ({layer.kind}) can't be quantized; its scheme must be "
                        f"keep, not {scheme}"
                    )
        carried = any(s.carried for held in made.values() for s in held)
        if all(len(held) == 1 for held in made.values()):
            ranges = ONE_RANGE.counted(ranges.total)
        ranges = ranges if carried else ranges.counted(0)
        achieved = cost(
            graph, made, ranges, latency=latency, groups=budget.groups if budget else ()
        )
        check_budget(budget, achieved)
        order = [layer.name for layer in graph] + [name for name in made if is_site(name)]
        held = {n: made[n] for n in order if not is_site(n) or made[n] != (KEEP,)}
        return Plan(graph.id, held, achieved, budget, solver or UNSOLVED, steps=ranges)

    @staticmethod
    def uniform(graph: OpGraph, scheme: Scheme | str) -> Plan:
        """The same scheme for every layer that can have it; the others keep full precision.

        Args:
            graph: the model's graph.
            scheme: for every layer that can have it.

        Returns:
            The plan with its costs.
        """
        chosen = Scheme.parse(scheme)
        return Plan.make(
            graph,
            {x.name: chosen if x.quantizable and can_have(x, chosen) else KEEP for x in graph},
            solver=Solver("uniform", "unsolved"),
        )

    def at(self, place: int) -> dict[str, Scheme]:
        """Site -> its scheme in range number `place` of the steps.

        Args:
            place: number of the range, from 0, the noisiest.

        Returns:
            A scheme for each site.
        """
        if not 0 <= place < len(self.steps):
            raise QSearchError(f"the plan has {len(self.steps)} ranges of steps; given {place}")
        return {name: held[place if len(held) > 1 else 0] for name, held in self.choices.items()}

    @property
    def single(self) -> dict[str, Scheme]:
        """Site -> its scheme, of a plan with one range of steps.

        Raises:
            QSearchError: the plan has several ranges, which the caller can't carry out.
        """
        if len(self.steps) > 1:
            raise QSearchError(
                f"this plan has {len(self.steps)} ranges of sampler steps, and what is asked for "
                "takes a plan of one: "
                "allocate without --steps"
            )
        return self.at(0)

    @property
    def layers(self) -> dict[str, Scheme]:
        """Layer -> its scheme, of a plan with one range and nothing but layers.

        Raises:
            QSearchError: the plan has several ranges or says something of an attention, which would
                be dropped in silence.
        """
        held = self.single
        if sites := [name for name in held if is_site(name)]:
            raise QSearchError(
                f"this plan also says what happens in attention ({sites[0]}: {held[sites[0]]}), "
                "and what is asked for "
                "takes layers alone: keep the sites of attention"
            )
        return held

    @property
    def weights(self) -> dict[str, Choices]:
        """Layer -> its choices, without the sites of attention."""
        return {name: held for name, held in self.choices.items() if not is_site(name)}

    @property
    def sites(self) -> dict[str, Choices]:
        """Site of attention -> its choices."""
        return {name: held for name, held in self.choices.items() if is_site(name)}

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that some site has in some range, in order of appearance."""
        return tuple(dict.fromkeys(s for held in self.choices.values() for s in held))

    def text(self, site: str) -> str:
        """What the plan says of a site: a scheme, or one for each range of steps with bars between
        them.

        Args:
            site: a layer, or a site of attention.

        Returns:
            E.g. `uint4-c | keep`.
        """
        return " | ".join(str(scheme) for scheme in self.choices.get(site, (KEEP,)))

    @property
    def id(self) -> str:
        """Digest of the graph, of the ranges of steps and of the choices."""
        return plan_id(self.graph, said(self.choices), self.steps)

    @property
    def compression(self) -> float:
        """How many times smaller than 16 bits a weight."""
        return FULL_BITS / self.achieved.average_bits

    def replaced(
        self,
        graph: OpGraph,
        changes: Mapping[str, Scheme | Sequence[Scheme]],
        *,
        latency: Latency | None = None,
        steps: StepRanges | None = None,
    ) -> Plan:
        """The plan with other choices at some sites, priced again; its budget is not checked.

        Args:
            graph: the model's graph.
            changes: site -> its new choices.
            latency: times, for the cost in seconds.
            steps: ranges of sampler steps, if not the plan's own.

        Returns:
            Another plan, without a budget.
        """
        made: dict[str, Any] = {**self.choices, **changes}
        ranges = self.steps if steps is None else steps
        return Plan.make(graph, made, None, self.solver, steps=ranges, latency=latency)

    def save(
        self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0
    ) -> None:
        """Write `plan.json`, one site a line.

        Args:
            path: of the file.
            key: digest of what it was made from.
            parents: file -> digest, of the files that it was made from.
            seed: of what was drawn.
        """
        header = Header(SCHEMA, graph=self.graph, key=key, parents=dict(parents or {}), seed=seed)
        content: dict[str, Any] = {
            "budget": self.budget.content() if self.budget else None,
            "achieved": asdict(self.achieved),
            "solver": asdict(self.solver),
            "steps": self.steps.content(),
            "sites": said(self.choices),
        }
        write_json(path, header, content, lines=("sites",))

    @staticmethod
    def load(path: Path, graph: OpGraph, *, latency: Latency | None = None) -> Plan:
        """Read a plan for `graph`, of this or an earlier schema version (`plan.json`,
        `stepplan.json`, schemes with `~stepsN`).

        Choices are parsed, costs computed again for the graph at hand. The time is computed again
        with a `latency` table; without one the stored time stands. A budget that the plan kept at
        another resolution or batch is not held against it.

        Args:
            path: of the file.
            graph: the model's graph.
            latency: times, for the cost in seconds.

        Returns:
            The plan, with its budget and what the solver said.

        Raises:
            ArtifactError: the file is no whole plan, is for another graph, or was changed by hand.
        """
        header, content = read_json(path, SCHEMA, graph.id, earlier=_EARLIER)
        try:
            steps, choices = _stated(path, header, content)
            budget = Budget(**content["budget"]) if content["budget"] else None
            plan = Plan.make(graph, choices, None, Solver(**content["solver"]), steps=steps)
            stored = Cost(**content["achieved"])
            groups = budget.groups if budget else ()
            achieved = cost(graph, plan.choices, plan.steps, latency=latency, groups=groups)
        except ArtifactError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is not a whole plan ({type(error).__name__}: {error}); make it again "
                "with `qsearch allocate`"
            ) from error
        filled = sum(stored_bits(x, plan.choices[x.name], filled=True) for x in graph)
        if stored.bits not in (achieved.bits, filled):
            raise ArtifactError(
                f"{path} says {stored.bits} stored bits, its layers take {achieved.bits}; it was "
                "changed by hand, make it again"
            )
        if latency is None and stored.latency is not None:
            if not isinstance(stored.latency, float | int) or not 0 <= stored.latency < math.inf:
                raise ArtifactError(
                    f"{path} says a latency of {stored.latency!r}, which is no time; make it "
                    "again with `qsearch allocate`"
                )
            achieved = replace(achieved, latency=float(stored.latency))
        if stored.bit_operations == achieved.bit_operations:
            check_budget(budget, achieved)
        return replace(plan, achieved=achieved, budget=budget, header=header)


def read_plan(path: Path) -> tuple[dict[str, Any], StepRanges, dict[str, Any]]:
    """(content, ranges of steps, site -> its choices as text) of a plan's file, for whoever shows
    it without its graph.

    Raises:
        ArtifactError: the file is no plan.
    """
    header, content = read_json(path, SCHEMA, earlier=_EARLIER)
    try:
        return content, *_stated(path, header, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a whole plan ({type(error).__name__}: {error}); make it again with "
            "`qsearch allocate`"
        ) from error


def said(choices: Mapping[str, Choices]) -> dict[str, str | list[str]]:
    """Choices as plain data: a string, or a list of them, one for each range."""
    return {
        name: str(held[0]) if len(held) == 1 else [str(s) for s in held]
        for name, held in choices.items()
    }


def plan_id(graph: str, choices: Mapping[str, str | list[str]], steps: StepRanges) -> str:
    """Digest of what a plan says, from its plain data."""
    content: dict[str, Any] = {
        "graph": graph,
        "layers": {k: v for k, v in choices.items() if not is_site(k)},
    }
    if sites := {k: v for k, v in choices.items() if is_site(k)}:
        content["sites"] = sites
    if len(steps) > 1:
        content["steps"] = steps.content()
    return digest(content)


def _stated(
    path: Path, header: Header, content: Mapping[str, Any]
) -> tuple[StepRanges, dict[str, Any]]:
    """Ranges and choices of a file of any version."""
    if header.schema == SCHEMA:
        return StepRanges.parse(content["steps"]), dict(content["sites"])
    return converted(path, content)


def __getattr__(name: str) -> Any:
    if name in ("BitPlan", "StepPlan"):
        warnings.warn(f"{name} is Plan since 0.2.0", DeprecationWarning, stacklevel=2)
        return Plan
    if name in ("Budget", "Cost", "cost", "select"):
        warnings.warn(
            f"{name} is in qsearch.core.cost since 0.2.0", DeprecationWarning, stacklevel=2
        )
        return getattr(costs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
