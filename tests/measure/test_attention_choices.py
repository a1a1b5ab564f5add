"""Whole attentions in plans: simulated with state that follows the sampler, priced through the
sampler, planned over ranges.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qsearch.choices.attention import attention_plugin
from qsearch.core.artifacts import digest
from qsearch.core.cost import Budget, cost
from qsearch.core.errors import InfeasibleBudget, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.steps import StepRanges, clock_of
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.decide.objectives import Objective
from qsearch.decide.ranges import ranges_of
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.attention import passing
from qsearch.measure.gradients import signs
from qsearch.measure.pipelines import Prompts, Sampling, example_inputs, record, sample
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.quantized_weights import weights_for
from qsearch.measure.simulation import simulate
from qsearch.measure.sparse import sparse_attention
from tests.models import tiny_pipeline

STEPS = 6
CHOICES = ("window4", "window4~rettention~every3", "dense~cached~every3")
SUMS = 2e-5


@pytest.fixture(scope="module")
def case() -> tuple[Any, OpGraph, Prompts, Sampling]:
    """A pipeline of random weights, its graph, what is sampled and how."""
    pipe, prompts = tiny_pipeline(), Prompts(("a red circle", "a blue square"))
    sampling = Sampling(steps=STEPS, seed=3)
    call, *_ = record(pipe, prompts[:1], sampling, 1)
    return pipe, extract(pipe.unet, example_inputs(call, pipe.unet)), prompts, sampling


@pytest.fixture(scope="module")
def table(case: tuple[Any, OpGraph, Prompts, Sampling]) -> SensitivityTable:
    """Layers and attentions priced through the whole sampler."""
    return priced(case, 1)


def priced(case: tuple[Any, OpGraph, Prompts, Sampling], ranges: int) -> SensitivityTable:
    """The same, where choices begin anew in each of so many ranges of steps."""
    pipe, graph, prompts, sampling = case
    return profile_pipeline(
        pipe,
        graph,
        prompts,
        sampling,
        schemes=("uint4-c",),
        attentions=CHOICES,
        attention_ranges=ranges,
        mode="trajectory",
        metrics=("sqnr",),
        probes=2,
        batch=2,
    )


def site_of(graph: OpGraph) -> str:
    return next(iter(graph.self_attentions.values())).site


@pytest.mark.parametrize("ranges", [1, 3])
def test_a_share_is_the_derivative_of_the_sampler_along_what_a_choice_does_with_old_statistics(
    case: tuple[Any, OpGraph, Prompts, Sampling], ranges: int
) -> None:
    pipe, graph, prompts, sampling = case
    table = priced(case, ranges)
    spec = next(iter(graph.self_attentions.values()))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def listen(made: Tensor, given: Any, scale: float | None) -> Tensor:
        seen.append(tuple(x.clone() for x in given))  # type: ignore[arg-type]
        return made

    with passing(pipe.unet, {spec.site: listen}):
        sample(pipe, prompts, sampling)
    assert len(seen) == STEPS
    assert table.responses is not None
    for text in CHOICES:
        every = 3 if "every" in text else 1

        def moved(size: float, text: str = text, every: int = every) -> Tensor:
            step = 0

            def through(made: Tensor, given: Any, scale: float | None) -> Tensor:
                nonlocal step
                stale = step % (STEPS // ranges) % every
                before = seen[step - stale] if every > 1 else None
                output = attention_plugin(text).made(text, spec, before, None, None)
                still = torch.nn.functional.scaled_dot_product_attention(*seen[step])
                moves = output(seen[step], stale) - still if stale or every == 1 else 0 * still
                step += 1
                return made + size * moves

            with passing(pipe.unet, {spec.site: through}):
                return sample(pipe, prompts, sampling)

        slope = (moved(0.1) - moved(-0.1)) / 0.2
        row = table.responses.choices.index((spec.site, text))
        for probe in range(2):
            seed = int(digest([0, "sqnr", 0, 0, probe]), 16) % 2**63
            found = float(table.responses.values["sqnr", 0][row, :, probe, 0].sum())
            v = signs(slope.flatten(1).shape, seed, slope.device)
            wanted = float((v * slope.flatten(1)).sum())
            scale = float(slope.norm())
            assert abs(found - wanted) < 0.05 * scale, (text, found, wanted)


@pytest.mark.parametrize("ranges", [1, 3])
def test_the_sweep_prices_the_same_choices(
    case: tuple[Any, OpGraph, Prompts, Sampling], ranges: int
) -> None:
    pipe, graph, prompts, sampling = case
    one = [replace(x, quantizable=i == 1) for i, x in enumerate(graph)]
    swept = profile_pipeline(
        pipe,
        replace(graph, layers=tuple(one)),
        prompts,
        sampling,
        schemes=("keep+a8",),
        attentions=("window4~rettention~every3",),
        attention_ranges=ranges,
        mode="trajectory",
        metrics=("sqnr",),
        estimator="sweep",
        batch=2,
    )
    site, text = site_of(graph), "window4~rettention~every3"
    row = swept.frame[(swept.frame["site"] == site) & (swept.frame["scheme"] == text)]
    reference = sample(pipe, prompts, sampling)
    choices: dict[str, Any] = {x.name: KEEP for x in graph} | {site: [text] * ranges}
    plan = Plan.make(graph, choices, steps=StepRanges.equal(ranges))
    with simulate(pipe.unet, plan, graph):
        made = sample(pipe, prompts, sampling)

    error = float((made - reference).square().sum() / reference.square().sum())
    assert float(row["estimate"].iloc[0]) == pytest.approx(error, rel=1e-3)


def test_each_range_of_a_plan_begins_with_a_dense_step(
    case: tuple[Any, OpGraph, Prompts, Sampling],
) -> None:
    pipe, graph, prompts, sampling = case
    spec = next(iter(graph.self_attentions.values()))
    text = "window4~rettention~every5"
    ranged = Plan.make(
        graph,
        {x.name: KEEP for x in graph} | {spec.site: [text, text]},
        steps=StepRanges.equal(2),
    )
    assert len(ranged.choices[spec.site]) == 2  # statistics of each range are its own
    clock, own = clock_of(pipe.unet), attention_plugin(text).simulated(text, spec, None)
    dense: list[int] = []

    class Watched:
        def attend(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
            if clock.step in (0, 3):
                own.reset()
                dense.append(clock.step)
            return own.attend(q, k, v, **more)

        def reset(self) -> None:
            own.reset()

    with (
        clock.following(pipe.scheduler),
        sparse_attention(pipe.unet, {spec.module: Watched()}, lambda: clock.step),
    ):
        by_hand = sample(pipe, prompts, sampling)
    with simulate(pipe.unet, ranged, graph):
        made, again = (sample(pipe, prompts, sampling) for _ in range(2))
    with simulate(pipe.unet, {spec.site: Scheme.parse(text)}, graph):
        on = sample(pipe, prompts, sampling)

    assert dense == [0, 3]
    torch.testing.assert_close(made, by_hand, atol=0, rtol=0)
    torch.testing.assert_close(made, again, atol=0, rtol=0)
    assert float((on - made).abs().max()) > 0  # one choice goes on where a range would begin


def test_plans_over_ranges_choose_attentions_and_weights_under_one_budget(
    case: tuple[Any, OpGraph, Prompts, Sampling], table: SensitivityTable, tmp_path: Path
) -> None:
    _, graph, _, _ = case
    budget = Budget(average_bits=6.0, attention_share=0.8)

    plan = allocate(graph, table, budget, metric="sqnr", steps=StepRanges.equal(2))

    assert plan.achieved.average_bits <= 6 and plan.achieved.attention_share <= 0.8
    assert any(s.attention for held in plan.sites.values() for s in held)
    assert plan.steps.total == STEPS
    spec = next(iter(graph.self_attentions.values()))
    long = {x.name: KEEP for x in graph} | {spec.site: ["dense~cached~every6", "keep"]}
    shares = [
        1 - Plan.make(graph, long, steps=steps).achieved.attention_share
        for steps in (StepRanges.equal(2), StepRanges.equal(2).counted(STEPS))
    ]
    # a range of three steps holds one dense one, whatever the choice says
    assert shares[1] / shares[0] == pytest.approx((2 / 3) / (5 / 6))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", graph)
    assert (loaded.choices, loaded.achieved) == (plan.choices, plan.achieved)
    with pytest.raises(InfeasibleBudget, match=r"no plan reaches attention_share 0\.01"):
        allocate(graph, table, Budget(attention_share=0.01), metric="sqnr")
    whole = Budget(
        total_bit_operations=0.5
        * cost(graph, Plan.uniform(graph, KEEP).choices).total_bit_operations
    )
    joint = allocate(graph, table, whole, metric="sqnr")
    assert joint.achieved.total_bit_operations <= whole.limits["total_bit_operations"]


def test_the_solver_s_attentions_are_the_best_of_all_combinations(
    case: tuple[Any, OpGraph, Prompts, Sampling], table: SensitivityTable
) -> None:
    import itertools

    _, graph, _, _ = case
    sites = [s.site for s in graph.self_attentions.values()][:2]
    values = {x.name: {"keep": 0.0} for x in graph.quantizable}
    losses = table.values("sqnr")
    values |= {s: {"keep": 0.0} | losses[s] for s in sites}
    options = ["keep", *CHOICES]

    def planned(picks: Any) -> Plan:
        return Plan.make(
            graph, {x.name: KEEP for x in graph} | dict(zip(sites, picks, strict=True))
        )

    limit = 0.9
    allowed = [
        sum(values[s][p] for s, p in zip(sites, picks, strict=True))
        for picks in itertools.product(options, repeat=len(sites))
        if planned(picks).achieved.attention_share <= limit
    ]

    plan = allocate(graph, values, Budget(attention_share=limit))

    found = sum(values[s][str(held[0])] for s, held in plan.sites.items())
    assert found == pytest.approx(min(allowed))


def test_a_packed_model_computes_attention_as_simulated_and_keeps_it_in_its_file(
    case: tuple[Any, OpGraph, Prompts, Sampling], tmp_path: Path
) -> None:
    _, graph, prompts, sampling = case
    pipe, site = tiny_pipeline(), site_of(graph)
    layers: dict[str, Any] = {x.name: "uint4-c" if x.quantizable else "keep" for x in graph}
    choice = "window4~rettention~every2~fit"
    plan = Plan.make(graph, layers | {site: [choice, "dense~cached"]}, steps=StepRanges.equal(2))
    calls = record(pipe, prompts, sampling, bins=STEPS)
    with (
        pytest.raises(QSearchError, match=r"~fit at .* is fitted on calls of consecutive steps"),
        simulate(pipe.unet, plan, graph),
    ):
        pass
    weights = weights_for(pipe.unet, graph, [plan], calls)
    with simulate(pipe.unet, plan, graph, weights):
        wanted = sample(pipe, prompts, sampling)

    apply(pipe.unet, plan, graph, weights)
    made = sample(pipe, prompts, sampling)
    save(pipe.unet, tmp_path / "model.safetensors", graph, plan)
    other = tiny_pipeline()
    load(tmp_path / "model.safetensors", other.unet, graph)
    again = sample(other, prompts, sampling)

    torch.testing.assert_close(made, wanted, atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(again, made, atol=0, rtol=0)


def test_what_can_t_be_is_said_before_anything_is_measured(
    case: tuple[Any, OpGraph, Prompts, Sampling],
) -> None:
    pipe, graph, prompts, sampling = case

    def asked(*attentions: str, **more: Any) -> None:
        profile_pipeline(pipe, graph, prompts, sampling, attentions=attentions, probes=2, **more)

    with pytest.raises(QSearchError, match="carries statistics from step to step"):
        asked("window4~rho")
    with pytest.raises(QSearchError, match=r"no attention can have window999; .*N is 1 to"):
        asked("window999")
    with pytest.raises(QSearchError, match="take choices of `qsearch list attentions`"):
        asked("int4-c")
    with pytest.raises(QSearchError, match="matches none"):
        asked("window4", attention_sites=("*attn9*",))
    site = site_of(graph)
    with pytest.raises(QSearchError, match="is for an attention as a whole"):
        Plan.uniform(graph, "window4")
    with pytest.raises(QSearchError, match=r"dense, or spelt as by .*given keep\+a8"):
        Plan.make(graph, {x.name: KEEP for x in graph} | {site: "keep+a8"})
    with pytest.raises(QSearchError, match=r"fitted on calls of consecutive steps; these are of"):
        fit = Plan.make(graph, {x.name: KEEP for x in graph} | {site: "window4~rho~fit"})
        weights_for(pipe.unet, graph, [fit], record(pipe, prompts, sampling, bins=2))


def test_attentions_that_carry_nothing_are_priced_on_recorded_calls(
    case: tuple[Any, OpGraph, Prompts, Sampling],
) -> None:
    pipe, graph, prompts, sampling = case
    made = profile_pipeline(
        pipe,
        graph,
        prompts,
        sampling,
        schemes=("uint8-c",),
        attentions=("window4", "dense+qk8"),
        bins=2,
        probes=4,
        batch=1,
    )

    rows = made.frame[made.frame["site"] == site_of(graph)]
    assert set(rows["scheme"]) == {"window4", "dense+qk8"} and np.all(rows["estimate"] > 0)


def test_a_range_loses_what_its_choice_does_there_and_interactions_are_counted_over_ranges(
    case: tuple[Any, OpGraph, Prompts, Sampling],
) -> None:
    _, graph, _, _ = case
    table, steps = priced(case, 3), StepRanges.equal(3).counted(STEPS)
    site, kept = site_of(graph), {x.name: KEEP for x in graph}
    losses = ranges_of(table, Objective({"sqnr": 1.0}), steps).values
    for text in CHOICES:
        for place, own in enumerate(losses):
            choices: list[Any] = [text if i == place else KEEP for i in range(3)]
            plan = Plan.make(graph, kept | {site: choices}, steps=steps)
            assert own[site][text] == pytest.approx(table.predict(plan, metric="sqnr")[0], rel=1e-5)

    def predicted(solver: str) -> float:
        budget = Budget(average_bits=16, attention_share=0.5)
        plan = allocate(graph, table, budget, metric="sqnr", steps=steps, solver=solver, trust=1.0)
        assert plan.achieved.attention_share <= 0.5
        return table.predict(plan, metric="sqnr")[0]

    assert predicted("local") <= predicted("ilp") * (1 + 1e-6)
