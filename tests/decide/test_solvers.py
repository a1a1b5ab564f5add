"""Solvers beyond the contract: interactions, frontiers, reasons, searches on real evaluations,
plans for each bin of steps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qsearch.core.cost import Budget
from qsearch.core.errors import InfeasibleBudget, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.interactions import shrinkage_weight
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.steps import StepRanges
from qsearch.core.table import SensitivityTable
from qsearch.decide import descent
from qsearch.decide.allocation import allocate, allocate_frontier, state
from qsearch.decide.building import make_problem
from qsearch.decide.descent import Descent, convex_bound
from qsearch.decide.problem import Problem
from qsearch.decide.program import Found
from qsearch.decide.relaxation import Hull, relax
from qsearch.decide.solvers import ilp, lagrangian, local, nsga2, tpe
from qsearch.decide.why import why

from .test_allocation import SCHEMES, ladder, make_table, random_noise


def random_problem(
    sites: int, choices: int, seed: int, share: float = 0.3, probes: int = 0
) -> Problem:
    """Falling values, rising costs, one limit; with scores whose mean squares are the values where
    there are probes.
    """
    dice = np.random.default_rng(seed)
    options = tuple(Scheme.parse(f"uint{2 + i % 7}-g{8 * (i + 1)}") for i in range(choices))
    values = tuple(np.sort(dice.lognormal(0, 2, choices))[::-1].copy() for _ in range(sites))
    costs = tuple(np.sort(dice.lognormal(0, 1, choices)) for _ in range(sites))
    low, high = sum(c.min() for c in costs), sum(c.max() for c in costs)
    scores = None
    if probes:
        scores = dice.normal(0, 1, (probes, sites, choices)) + dice.normal(0, 1, (probes, 1, 1))
        scores *= np.sqrt(np.array(values) / (scores**2).mean(0))
    name = "average_bits"
    return Problem(
        tuple(f"s{i}" for i in range(sites)),
        (options,) * sites,
        values,
        {name: costs},
        {name: float(low + share * (high - low))},
        None,
        scores,
    )


# ------------------------------------------------------------------------------------- interactions


def test_the_quadratic_total_is_the_mean_square_of_the_plan_s_scores() -> None:
    problem = random_problem(5, 3, 0, probes=7)
    assert problem.scores is not None
    picks = np.array([0, 1, 2, 1, 0])

    whole = float((problem.scores[:, np.arange(5), picks].sum(1) ** 2).mean())

    assert problem.worth(picks) == pytest.approx(whole, rel=1e-12)
    assert replace(problem, trust=0.0).worth(picks) == pytest.approx(
        sum(v[k] for v, k in zip(problem.values, picks, strict=True))
    )


def test_local_search_finds_the_best_of_most_small_problems_and_its_bound_is_below() -> None:
    ratios = []
    for seed in range(12):
        problem = random_problem(6, 3, seed, probes=8)
        best = min(
            problem.worth(p)
            for p in map(np.array, itertools.product(range(3), repeat=6))
            if problem.keeps(p)
        )
        chosen, said = local.solve(problem, seconds=5.0)
        assert said.bound is not None
        assert said.bound <= best * (1 + 1e-9)
        ratios.append(problem.total(chosen) / best)

    assert sorted(ratios)[9] == pytest.approx(1.0, rel=1e-9)
    assert max(ratios) < 1.25  # one lies in a valley of its own


def test_changes_are_priced_as_if_each_were_made() -> None:
    problem = random_problem(5, 4, 3, probes=6)
    descent, picks = Descent(problem), np.array([1, 2, 3, 0, 1])
    taken = descent.scores[:, descent.rows, picks]
    along = np.einsum("p,plc->lc", taken.sum(1), descent.scores)
    beside = np.einsum("pl,plc->lc", taken, descent.scores)

    change = descent._changes(picks, along, beside)

    for site, choice in itertools.product(range(5), range(4)):
        other = picks.copy()
        other[site] = choice
        if choice != picks[site]:
            assert change[site, choice] == pytest.approx(
                problem.worth(other) - problem.worth(picks), rel=1e-9, abs=1e-12
            )


def test_the_tangents_bound_is_tight_where_the_relaxation_is() -> None:
    problem = replace(random_problem(200, 4, 1, probes=8), trust=0.0)

    chosen, said = local.solve(problem, seconds=5.0)

    assert said.gap is not None
    assert said.gap < 0.01  # without interactions it is the Lagrangian bound
    assert convex_bound(problem, problem.picks(chosen), ends=math.inf, rounds=3) <= said.objective


def test_products_of_unrelated_layers_are_not_trusted() -> None:
    dice = np.random.default_rng(0)

    assert shrinkage_weight(dice.normal(size=(24, 60, 4))) < 0.05


def test_products_that_all_share_a_cause_are_trusted() -> None:
    dice = np.random.default_rng(0)
    shared = dice.normal(size=(24, 1, 1)) * dice.choice([-1.0, 1.0], (1, 60, 4))

    assert shrinkage_weight(shared + 0.1 * dice.normal(size=(24, 60, 4))) > 0.85


def test_the_shrinkage_is_that_of_all_pairs_written_out() -> None:
    dice = np.random.default_rng(1)
    scores = dice.normal(size=(9, 4, 3)) + 0.7 * dice.normal(size=(9, 1, 1))
    unit = scores / np.sqrt((scores**2).mean(0))
    squares = variances = 0.0
    for i, j in itertools.product(range(4), repeat=2):
        for a, b in itertools.product(range(3), repeat=2):
            if i != j:
                products = unit[:, i, a] * unit[:, j, b]
                squares += products.mean() ** 2
                variances += products.var(ddof=1) / 9

    assert shrinkage_weight(scores) == pytest.approx(1 - variances / squares, rel=1e-9)


def test_scores_go_by_name_and_tied_layers_add_theirs(graph: OpGraph) -> None:
    noise = random_noise(graph, 0)
    scores = {
        n: {s: np.full(3, float(i + 10 * j)) for j, s in enumerate(SCHEMES)}
        for i, n in enumerate(noise, start=1)
    }

    problem = make_problem(
        graph,
        {n: {**row, "keep": 0.0} for n, row in noise.items()},
        Budget(average_bits=9.0),
        scores=(scores,),
        trust=1.0,
    )

    assert problem.scores is not None
    for i, site in enumerate(problem.sites):
        for j, choice in enumerate(problem.choices[i]):
            expected = 0.0 if str(choice) == "keep" else scores[site][str(choice)][0]
            assert problem.scores[0, i, j] == expected
    with pytest.raises(QSearchError, match="no scores for uint8-c at out"):
        make_problem(
            graph,
            noise,
            Budget(average_bits=9.0),
            scores=({**scores, "out": {"uint2-c": np.zeros(3), "uint4-c": np.zeros(3)}},),
        )


# ----------------------------------------------------------------------------------------- frontier


def test_the_relaxation_is_the_same_by_hull_and_by_linear_program() -> None:
    problem = random_problem(30, 5, 2)
    twice = replace(
        problem,
        costs={**problem.costs, "bytes": problem.costs["average_bits"]},
        limits={**problem.limits, "bytes": 1e9},
    )

    one, two = relax(problem), relax(twice)

    assert one is not None
    assert two is not None
    assert one.bound == pytest.approx(two.bound, rel=1e-6)


def test_every_bound_of_the_hull_is_below_the_optimum() -> None:
    problem = random_problem(12, 4, 5)
    hull = Hull(problem)
    for share in np.linspace(0.0, 1.0, 9):
        low = sum(c.min() for c in problem.costs["average_bits"])
        limit = low + share * (sum(c.max() for c in problem.costs["average_bits"]) - low)
        at = hull.at(limit)
        _, said = ilp.solve(replace(problem, limits={"average_bits": limit}))
        assert at is not None
        assert at.bound <= said.objective * (1 + 1e-9)
        assert said.status == "optimal"


def test_a_frontier_has_a_plan_for_every_budget_and_never_gets_worse() -> None:
    graph = ladder(60, 3)
    table = make_table(graph, random_noise(graph, 3))
    bits = [2.6 + 0.3 * i for i in range(15)]

    plans = allocate_frontier(graph, table, bits)

    assert [p.budget.average_bits for p in plans if p.budget] == bits
    losses = [p.solver.objective for p in plans]
    assert losses == sorted(losses, reverse=True)
    for plan in plans[::5]:
        assert plan.budget is not None
        exact = allocate(graph, table, plan.budget).solver.objective
        assert exact <= plan.solver.objective <= 1.02 * exact
        assert plan.solver.bound <= exact * (1 + 1e-9)


def test_budgets_of_a_frontier_that_can_t_be_reached_are_left_out_and_none_at_all_is_an_error() -> (
    None
):
    graph = ladder(10, 3)
    table = make_table(graph, random_noise(graph, 3))

    assert [
        p.budget.average_bits for p in allocate_frontier(graph, table, [1.0, 5.0]) if p.budget
    ] == [5.0]
    with pytest.raises(InfeasibleBudget, match="no plan reaches average_bits"):
        allocate_frontier(graph, table, [0.5, 1.0])


def test_a_frontier_keeps_the_other_limits() -> None:
    graph = ladder(10, 3)
    table = make_table(graph, random_noise(graph, 3))
    most = Plan.uniform(graph, "uint4-c").achieved.bit_operations

    plans = allocate_frontier(graph, table, [4.0, 6.0, 8.0], budget=Budget(bit_operations=most))

    assert all(p.achieved.bit_operations <= most for p in plans)
    assert len(plans) == 3


# ---------------------------------------------------------------------------------------------- why


def test_the_reasons_are_those_of_brute_force(graph: OpGraph) -> None:
    noise = random_noise(graph, 4)
    table, budget = make_table(graph, noise), Budget(average_bits=9.5)
    plan = allocate(graph, table, budget)

    found = why(state(graph, table, budget), plan, "blocks.0.ff")

    for option in found.options:
        forced = {
            **noise,
            "blocks.0.ff": {option.choice: noise["blocks.0.ff"].get(option.choice, 0.0)},
        }
        losses = []
        for chosen in itertools.product(
            *[[*row, "keep"] if n != "blocks.0.ff" else [*row] for n, row in forced.items()]
        ):
            made = Plan.make(graph, {"embed": "keep", **dict(zip(forced, chosen, strict=True))})
            if not budget.excess(made.achieved):
                losses.append(
                    sum(forced[n].get(str(s), 0.0) for n, s in made.layers.items() if n in forced)
                )
        assert option.plan == (pytest.approx(min(losses), rel=1e-9) if losses else math.inf)
    assert [o.choice for o in found.options if o.chosen] == [str(plan.layers["blocks.0.ff"])]
    assert found.total == pytest.approx(plan.solver.objective)
    assert found.next_best is not None
    assert found.next_best.plan >= found.total
    assert found.with_more is not None
    assert found.with_more[1] == pytest.approx(
        allocate(graph, table, Budget(average_bits=9.6)).solver.objective
    )
    assert min(o.priced for o in found.options) == 0.0


def test_a_shadow_price_is_what_a_little_more_budget_takes_off() -> None:
    graph = ladder(200, 1)
    table = make_table(graph, random_noise(graph, 1))
    budget = Budget(average_bits=4.0)

    found = why(state(graph, table, budget), allocate(graph, table, budget), "layers.0")

    assert found.with_less is not None
    assert found.with_more is not None
    gain, loss = found.total - found.with_more[1], found.with_less[1] - found.total
    assert (
        0.99 * gain <= 0.1 * found.prices["average_bits"] <= 1.01 * loss
    )  # the frontier is convex, its slope lies between


def test_a_layer_that_no_plan_chooses_for_is_answered_with_the_nearest(graph: OpGraph) -> None:
    table, budget = make_table(graph, random_noise(graph, 4)), Budget(average_bits=9.5)

    with pytest.raises(
        QSearchError,
        match=r"'blocks.0.fff' is no layer that a plan chooses for; did you mean 'blocks.0.ff'",
    ):
        why(state(graph, table, budget), allocate(graph, table, budget), "blocks.0.fff")


# ------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("solver", [tpe, nsga2])
def test_a_search_on_real_evaluations_finds_what_the_table_can_t_know(solver: Any) -> None:
    problem = random_problem(6, 3, 2)
    start, _ = ilp.solve(problem)
    seen = []
    loud = int(np.argmax(problem.picks(start)))

    def measured(
        chosen: dict[str, Any],
    ) -> float:  # the table has one site's values the wrong way round
        seen.append(chosen)
        picks = problem.picks(chosen)
        assert problem.keeps(picks)  # nothing is measured that could not be used
        return problem.worth(picks) + 100 * float(picks[loud])

    chosen, said = solver.solve(problem, evaluate=measured, trials=40, seed=1)

    assert seen[0] == start  # begins at the optimum by the table
    assert said.objective == measured(chosen) < measured(start)
    assert len({tuple(map(str, c.values())) for c in seen[:-2]}) == len(seen) - 2  # nothing twice


def test_when_time_is_up_the_best_plan_so_far_comes_with_its_gap() -> None:
    # Four limits, and values that are nearly what the costs are: nothing can be left out, and no
    # solver is quick.
    dice = np.random.default_rng(0)
    options = tuple(Scheme.parse(f"uint{2 + i}-c") for i in range(6))
    costs = {
        k: tuple(dice.integers(1, 1000, 6).astype(float) for _ in range(120))
        for k in ("average_bits", "bytes", "bit_operations", "latency")
    }
    values = tuple(
        2000.0 - sum(costs[k][i] for k in costs) / 4 + dice.integers(0, 60, 6) for i in range(120)
    )
    limits = {
        k: 0.35 * float(sum(x.min() for x in row)) + 0.65 * float(sum(x.mean() for x in row))
        for k, row in costs.items()
    }
    problem = Problem(tuple(f"s{i}" for i in range(120)), (options,) * 120, values, costs, limits)

    chosen, said = ilp.solve(problem, seconds=0.2)

    assert said.status == "time limit"
    assert said.gap is not None
    assert said.bound is not None
    assert 0 < said.gap < 0.01
    assert said.bound < problem.total(chosen)
    assert problem.keeps(problem.picks(chosen))


def test_an_optimum_that_is_none_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = next(
        p
        for seed in range(50)
        if (lagrangian.solve(p := random_problem(8, 4, seed))[1].gap or 0.0) > 1e-3
    )
    cheapest = np.array([int(np.argmin(c)) for c in problem.costs["average_bits"]])
    monkeypatch.setattr(
        ilp, "solve_program", lambda *given, **more: Found(cheapest, True, problem.worth(cheapest))
    )
    best, _ = lagrangian.solve(problem)

    chosen, said = ilp.solve(problem)

    assert said.status == "feasible"
    assert problem.total(chosen) <= problem.total(best) < problem.worth(cheapest)
    assert said.bound is not None
    assert said.bound <= problem.total(chosen)


def test_only_a_solver_that_evaluates_takes_evaluations(graph: OpGraph) -> None:
    table = make_table(graph, random_noise(graph, 0))
    seen: list[Plan] = []

    def measured(plan: Plan) -> float:
        seen.append(plan)
        return float(plan.layers["out"].bits)

    plan = allocate(graph, table, Budget(average_bits=9.0), solver="tpe", evaluate=measured)

    assert (
        plan.solver.objective == plan.layers["out"].bits == min(p.layers["out"].bits for p in seen)
    )
    assert seen[0].layers == allocate(graph, table, Budget(average_bits=9.0)).layers
    with pytest.raises(
        QSearchError, match="ilp takes the table's word and evaluates nothing; give tpe or nsga2"
    ):
        allocate(graph, table, Budget(average_bits=9.0), evaluate=measured)


# ---------------------------------------------------------------------------------------- step bins


def stepped(graph: OpGraph, seed: int, bins: int = 2) -> SensitivityTable:
    parts = [
        make_table(graph, random_noise(graph, seed + b)).frame.assign(step=b) for b in range(bins)
    ]
    import pandas as pd

    return SensitivityTable(graph.id, pd.concat(parts))


@pytest.mark.parametrize("seed", range(4))
def test_a_step_wise_plan_is_the_best_and_pays_for_every_copy(graph: OpGraph, seed: int) -> None:
    table = stepped(graph, 10 * seed)
    budget = Budget(average_bits=9.0)
    names = [x.name for x in graph.quantizable]
    noise = [table.values("noise", [b]) for b in range(2)]
    options = list(itertools.product([*SCHEMES, "keep"], repeat=2))
    best = math.inf
    for chosen in itertools.product(options, repeat=len(names)):
        plan = Plan.make(
            graph,
            {"embed": "keep", **dict(zip(names, chosen, strict=True))},
            steps=StepRanges.equal(2),
        )
        if not budget.excess(plan.achieved):
            best = min(
                best,
                sum(
                    noise[b][n].get(s, 0.0)
                    for n, row in zip(names, chosen, strict=True)
                    for b, s in enumerate(row)
                )
                / 2,
            )

    plan = allocate(graph, table, budget, steps=StepRanges.equal(2), share="none")

    assert plan.solver.objective == pytest.approx(best, rel=1e-9)
    assert plan.achieved.average_bits <= 9.0
    assert plan.solver.status == "optimal"


def test_one_format_in_two_bins_is_stored_once_and_two_formats_twice(graph: OpGraph) -> None:
    layers = {x.name: ("keep", "keep") for x in graph} | {"out": ("uint4-c", "uint4-c+a8")}
    one = Plan.make(graph, layers, steps=StepRanges.equal(2))
    two = Plan.make(graph, {**layers, "out": ("uint4-c", "uint8-c")}, steps=StepRanges.equal(2))

    assert (
        one.achieved.bits
        == Plan.make(graph, {**{x.name: "keep" for x in graph}, "out": "uint4-c"}).achieved.bits
    )
    assert two.achieved.bits == one.achieved.bits + Scheme.parse("uint8-c").stored_bits(
        graph.layer("out").weight_shape
    )


def test_a_step_wise_plan_comes_back_from_its_file(graph: OpGraph, tmp_path: Any) -> None:
    plan = allocate(
        graph, stepped(graph, 3), Budget(average_bits=9.0), steps=StepRanges.equal(2), share="none"
    )
    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json", graph) == plan


def test_a_step_wise_plan_above_its_budget_is_refused(graph: OpGraph) -> None:
    with pytest.raises(InfeasibleBudget, match=r"average_bits .* above its limit 16"):
        Plan.make(
            graph,
            {x.name: ("keep", "uint8-c") if x.quantizable else ("keep", "keep") for x in graph},
            Budget(average_bits=16.0),
            steps=StepRanges.equal(2),
        )
    with pytest.raises(InfeasibleBudget, match="no plan reaches average_bits 2"):
        allocate(graph, stepped(graph, 3), Budget(average_bits=2.0), steps=StepRanges.equal(2))


def test_local_search_finds_the_same_plan_on_a_slow_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that every look at it moves on: by the clock the search would end after some dozen
    moves.
    """
    clock = itertools.count(0.0, 0.02)
    slow = SimpleNamespace(monotonic=lambda: next(clock))
    for module in (descent, local):
        monkeypatch.setattr(module, "time", slow)
    dice, count = np.random.default_rng(0), 60
    problem = Problem(
        sites=tuple(f"l{i}" for i in range(count)),
        choices=(tuple(map(Scheme.parse, ("uint2-c", "uint3-c", "uint4-c", "uint8-c"))),) * count,
        values=tuple(dice.random(4) for _ in range(count)),
        costs={"bytes": (np.array([2.0, 3.0, 4.0, 8.0]),) * count},
        limits={"bytes": 3.7 * count},
        scores=dice.standard_normal((12, count, 4)),
        trust=1.0,
        members={f"l{i}": (f"l{i}",) for i in range(count)},
    )

    found = [local.solve(problem, seconds=s, seed=1)[0] for s in (1.0, 1000.0)]

    assert found[0] == found[1]
