"""search_schedule(graph, plan, choices, measure, ...) -> Schedule: choices of attentions and the
steps where they change, found by measuring whole samplings.

Sums of prices misjudge attentions that are far from dense: an output that is kept from an earlier
step is read by later blocks and later steps, and where a range begins decides which output that is.
So the search starts from single settings (a choice everywhere, in all steps or behind a dense
start), and changes the best that the budget allows: a range's choice for one group of attentions or
for all, a bound by some steps, one bound more or fewer. Choices are taken from those that no other
one beats alone. A change is kept where the mean error over captions falls, and by more than its
standard error over them, so that a schedule is not fitted to a few captions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..core.attentions import fault_of
from ..core.cost import Budget
from ..core.errors import InfeasibleBudget, QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..core.steps import StepRanges
from .attentions import undominated

Errors = NDArray[np.float64]
#: plan -> its error on each caption
Measure = Callable[[Plan], Errors]
#: share of the steps that are dense at the start of a setting's second form
_DENSE_START = 0.25
_SHIFTS = (1, -1, 2, -2, 4, -4)
_MOST_BOUNDS = 6
#: pairs of changes that are drawn where no single one is better
_PAIRS = 400


@dataclass(frozen=True)
class Schedule:
    """What was found.

    Attributes:
        plan: the best plan within the budget.
        error: its mean error over the captions.
        start: the mean error of the best single setting within the budget.
        measured: plans that were measured.
    """

    plan: Plan
    error: float
    start: float
    measured: int


@dataclass(frozen=True)
class _State:
    """Steps where ranges end, and for each range a choice for each group of attentions."""

    bounds: tuple[int, ...]
    choices: tuple[tuple[Scheme, ...], ...]

    def with_choice(self, place: int, groups: Sequence[int], choice: Scheme) -> _State:
        """Another choice in one range, for some groups."""
        row = list(self.choices[place])
        for group in groups:
            row[group] = choice
        return _State(self.bounds, (*self.choices[:place], tuple(row), *self.choices[place + 1 :]))


@dataclass
class _Search:
    """One search: what is fixed, and what has been measured."""

    graph: OpGraph
    plan: Plan
    choices: Sequence[Scheme]
    groups: Sequence[Sequence[str]]
    steps: int
    budget: Budget
    latency: Latency | None
    measure: Measure
    known: dict[str, Errors] = field(default_factory=dict)

    def made(self, state: _State, budget: Budget | None = None) -> Plan:
        """The plan of a state; an attention that can't have a choice is dense."""
        made: dict[str, Scheme | list[Scheme]] = {
            name: held[0] for name, held in self.plan.choices.items()
        }
        specs = {spec.site: spec for spec in self.graph.self_attentions.values()}
        for group, names in enumerate(self.groups):
            for name in names:
                row = [held[group] for held in state.choices]
                made[name] = [KEEP if fault_of(specs[name], c) else c for c in row]
        bounds = tuple(bound / self.steps for bound in state.bounds)
        return Plan.make(
            self.graph,
            made,
            budget,
            self.plan.solver,
            steps=StepRanges(bounds, self.steps),
            latency=self.latency,
        )

    def error(self, plan: Plan) -> Errors:
        """Measured, or found."""
        if plan.id not in self.known:
            self.known[plan.id] = np.asarray(self.measure(plan), float)
        return self.known[plan.id]

    def mean(self, plan: Plan) -> float:
        """Mean error over the captions."""
        return float(self.error(plan).mean())

    def offered(self) -> list[Scheme]:
        """The choices that no other one beats in error and in FLOPs at once, each measured alone in
        all steps, and dense attention.
        """
        plans = [self.made(_State((), ((c,) * len(self.groups),))) for c in self.choices]
        rows = np.array([[p.achieved.attention_share, self.mean(p)] for p in plans])
        return [KEEP, *(self.choices[k] for k in undominated(rows))]

    def singles(self) -> Iterator[_State]:
        """Each choice in all steps, and behind a dense start."""
        start = max(1, round(_DENSE_START * self.steps))
        dense = (KEEP,) * len(self.groups)
        for choice in self.choices:
            row = (choice,) * len(self.groups)
            yield _State((), (row,))
            if start < self.steps:
                yield _State((start,), (dense, row))

    def changed(self, state: _State, offered: Sequence[Scheme]) -> Iterator[_State]:
        """Every state that is one change away."""
        ranges = len(state.choices)
        every = [[g] for g in range(len(self.groups))]
        if len(self.groups) > 1:
            every.append(list(range(len(self.groups))))
        for place, groups, choice in itertools.product(range(ranges), every, offered):
            yield state.with_choice(place, groups, choice)
        for k, shift in itertools.product(range(ranges - 1), _SHIFTS):
            bounds = list(state.bounds)
            bounds[k] += shift
            yield _State(tuple(bounds), state.choices)
        for k in range(ranges - 1):
            bounds_left = state.bounds[:k] + state.bounds[k + 1 :]
            for drop in (k, k + 1):
                yield _State(bounds_left, state.choices[:drop] + state.choices[drop + 1 :])
        if len(state.bounds) < _MOST_BOUNDS:
            ends = (0, *state.bounds, self.steps)
            for place in range(ranges):
                for cut in range(ends[place] + 1, ends[place + 1]):
                    row = state.choices[place]
                    bounds = [*state.bounds[:place], cut, *state.bounds[place:]]
                    split = (*state.choices[:place], row, row, *state.choices[place + 1 :])
                    yield _State(tuple(bounds), split)

    def fitting(self, state: _State) -> Plan | None:
        """The plan of a state; None where its bounds cross or the budget does not allow it."""
        ends = (0, *state.bounds, self.steps)
        if not all(a < b for a, b in itertools.pairwise(ends)):
            return None
        try:
            return self.made(state, self.budget)
        except InfeasibleBudget:
            return None


def search_schedule(
    graph: OpGraph,
    plan: Plan,
    choices: Sequence[Scheme | str],
    measure: Measure,
    *,
    steps: int,
    budget: Budget | None = None,
    evaluations: int = 96,
    groups: int = 3,
    latency: Latency | None = None,
    seed: int = 0,
) -> Schedule:
    """`plan` with the best schedule of attentions that was found within its budget.

    Args:
        graph: the model's graph.
        plan: one choice for each layer; its attentions are replaced.
        choices: of attentions, such as `window16~residual` or `dense~cached`.
        measure: plan -> error on each caption, e.g. of final latents.
        steps: sampler steps, on which `measure` samples too.
        budget: limits; the plan's own when left out.
        evaluations: plans that are measured at most, or as many as there are single settings.
        groups: parts of the model's depth that may have choices of their own.
        latency: times, for a budget in seconds.
        seed: of the order in which changes are tried.

    Returns:
        The best plan that was measured within the budget.

    Raises:
        QSearchError: the model has no self-attention, the plan no budget, or ranges of steps for
            its layers.
        InfeasibleBudget: no single setting is within the budget.
    """
    sites = [spec.site for spec in graph.self_attentions.values()]
    if not sites:
        raise QSearchError(f"{graph.model} has no self-attention whose steps could be chosen")
    limits = budget or plan.budget
    if limits is None:
        raise QSearchError("a schedule is searched within a budget; the plan has none, give one")
    if any(len(set(held)) > 1 for held in plan.weights.values()):
        raise QSearchError(
            "a schedule of attentions makes ranges of steps; the plan's layers have some already: "
            "allocate with steps: 1"
        )
    parts = [list(map(str, part)) for part in np.array_split(np.array(sites), groups) if len(part)]
    offered = [s for s in dict.fromkeys(map(Scheme.parse, choices)) if s.attention]
    search = _Search(graph, plan, offered, parts, steps, limits, latency, measure)
    best = None
    for state in search.singles():
        made = search.fitting(state)
        if made is not None and (best is None or search.mean(made) < search.mean(best)):
            here, best = state, made
    if best is None:
        raise InfeasibleBudget(
            f"no attention of {', '.join(map(str, offered)) or 'none'} in all {steps} steps is "
            "within the budget"
        )
    start, dice, offered = search.mean(best), np.random.default_rng(seed), search.offered()
    while (better := _improved(search, here, best, offered, evaluations, dice)) is not None:
        here, best = better
    return Schedule(best, search.mean(best), start, len(search.known))


def _improved(
    search: _Search,
    here: _State,
    best: Plan,
    offered: Sequence[Scheme],
    most: int,
    dice: np.random.Generator,
) -> tuple[_State, Plan] | None:
    """The first state one or two changes away that is surely better; None where there is none, or
    `most` plans have been measured.
    """
    for state in _near(search, here, offered, dice):
        if len(search.known) >= most:
            return None
        made = search.fitting(state)
        if made is None or made.id in search.known:
            continue
        gain = search.error(best) - search.error(made)
        sure = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        if gain.mean() > sure:
            return state, made
    return None


def _near(
    search: _Search, here: _State, offered: Sequence[Scheme], dice: np.random.Generator
) -> Iterator[_State]:
    """States one change away in random order, then two changes away, drawn: at the budget's limit
    one attention gains what another one gives.
    """
    near = list(search.changed(here, offered))
    for k in dice.permutation(len(near)).tolist():
        yield near[k]
    for _ in range(_PAIRS):
        second = list(search.changed(near[dice.integers(len(near))], offered))
        yield second[dice.integers(len(second))]
