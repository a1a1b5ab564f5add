"""Schedules of attentions: the search measures within the budget alone, is never worse than a
single setting, and finds what one choice for all steps can't express.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qsearch.core.attentions import attention_share
from qsearch.core.cost import Budget
from qsearch.core.errors import InfeasibleBudget, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.steps import StepRanges
from qsearch.decide.schedules import Errors, search_schedule
from qsearch.graphs.extraction import extract
from tests.models import dit_inputs, tiny_dit

CHOICES = ("window4", "window8~residual", "dense~cached", "dense~cached~every5")
STEPS = 10


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return extract(tiny_dit(), dit_inputs())


class Bench:
    """An error that is small where the steps of the second half are dense in the last attention."""

    def __init__(self, graph: OpGraph, share: float) -> None:
        self.graph, self.seen = graph, list[Plan]()
        self.budget = Budget(average_bits=16, attention_share=share)
        self.start = Plan.uniform(graph, KEEP)

    def __call__(self, plan: Plan) -> Errors:
        self.seen.append(plan)
        error = 0.0
        specs = list(self.graph.self_attentions.values())
        for depth, spec in enumerate(specs):
            for step in range(STEPS):
                held = plan.choices.get(spec.site, (KEEP,))
                at = held[plan.steps.of(step, STEPS) if len(held) > 1 else 0]
                late = 10.0 if step >= STEPS // 2 and depth == len(specs) - 1 else 1.0
                error += late * (1 - attention_share(spec, at, STEPS))
        return error * np.array([1.0, 1.1, 0.9])

    def search(self, **asked: Any) -> Any:
        return search_schedule(
            self.graph, self.start, CHOICES, self, steps=STEPS, budget=self.budget, **asked
        )


def test_it_is_better_than_any_single_setting_and_within_the_budget(graph: OpGraph) -> None:
    bench = Bench(graph, 0.6)

    found = bench.search(evaluations=200)

    assert found.plan.budget == bench.budget
    assert found.plan.achieved.attention_share <= 0.6
    assert found.error < 0.8 * found.start
    assert found.measured == len(bench.seen) == len({plan.id for plan in bench.seen}) <= 200
    mine = [p for p in bench.seen if p.achieved.attention_share <= 0.6]
    assert found.error == pytest.approx(min(bench(p).mean() for p in mine))
    assert len(found.plan.steps) > 1


def test_it_ends_with_its_evaluations_and_is_the_same_again(graph: OpGraph) -> None:
    few = Bench(graph, 0.6).search(evaluations=20)

    assert few.measured <= 20 and few.error <= few.start
    assert Bench(graph, 0.6).search(evaluations=20) == few


def test_a_change_within_the_captions_spread_is_not_kept(graph: OpGraph) -> None:
    dice = np.random.default_rng(0)

    def noise(plan: Plan) -> Errors:
        return 1 + dice.normal(size=4)  # says nothing of the plan

    bench = Bench(graph, 0.6)
    found = search_schedule(
        graph, bench.start, CHOICES, noise, steps=STEPS, budget=bench.budget, evaluations=60
    )

    assert len(found.plan.steps) <= 4


def test_layers_keep_what_they_have(graph: OpGraph) -> None:
    layers = {x.name: "uint4-c" if x.quantizable else "keep" for x in graph}
    bench = Bench(graph, 0.6)
    bench.start = Plan.make(graph, layers)

    found = bench.search(evaluations=30)

    assert {n: str(held[0]) for n, held in found.plan.weights.items()} == layers


def test_what_can_t_be_searched_is_refused(graph: OpGraph) -> None:
    bench = Bench(graph, 0.01)
    with pytest.raises(InfeasibleBudget, match="in all 10 steps is within the budget"):
        bench.search()
    with pytest.raises(QSearchError, match="the plan has none, give one"):
        search_schedule(graph, bench.start, CHOICES, bench, steps=STEPS)
    first = next(x.name for x in graph if x.quantizable)
    ranged = bench.start.replaced(
        graph, {first: [Scheme.parse("uint4-c"), KEEP]}, steps=StepRanges.equal(2)
    )
    with pytest.raises(QSearchError, match="the plan's layers have some already"):
        search_schedule(graph, ranged, CHOICES, bench, steps=STEPS, budget=bench.budget)
