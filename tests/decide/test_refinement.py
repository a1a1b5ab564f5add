"""refine: the linear term is the error's own slope, the curvature the probes', and no plan comes
back worse than it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.steps import StepRanges
from qsearch.decide import refinement
from qsearch.decide.allocation import random_plan
from qsearch.decide.neighbourhood import around
from qsearch.decide.refinement import measure_noise, price_changes, refine
from qsearch.measure.pipelines import run
from qsearch.measure.quantized_weights import QuantizedWeights, weight_of
from qsearch.measure.simulation import simulate
from tests.models import plain, plain_calls

SCHEMES = ("uint2-c", "uint3-c", "uint4-c", "uint8-c")


@pytest.fixture(scope="module")
def tiny():
    model, graph = plain()
    return model, graph, [replace(call, steps=2) for call in plain_calls(2)]


def test_the_linear_term_is_the_slope_of_the_measured_error(tiny) -> None:
    model, graph, calls = tiny
    plan = Plan.uniform(graph, "uint3-c")
    weights, references = QuantizedWeights(model, graph), [run(model, c) for c in calls]
    options = [Scheme.parse(s) for s in SCHEMES]

    linear, _ = price_changes(
        model,
        graph,
        plan,
        around(graph, plan, options, "weights"),
        calls,
        references,
        weights,
        1,
        torch.Generator().manual_seed(0),
    )

    for name in ("conv_out", "blocks.0.attn1.to_v", "blocks.0.ff.2"):
        here, there = (
            weights.get(name, Scheme.parse("uint3-c")),
            weights.get(name, Scheme.parse("uint4-c")),
        )
        errors = []
        for share in (-0.01, 0.01):
            with simulate(model, plan, graph, weights):
                weight_of(model, name).data = here + share * (there - here)
                parts = [
                    float((run(model, c) - y).square().sum() / y.square().sum())
                    for c, y in zip(calls, references, strict=True)
                ]
            errors.append(sum(parts) / len(parts))
        slope = (errors[1] - errors[0]) / 0.02
        assert linear[name]["uint4-c"] == pytest.approx(slope, rel=0.03, abs=1e-6)
        assert linear[name]["uint3-c"] == 0.0


def test_the_mean_square_of_many_scores_is_the_error_of_that_change_alone(tiny) -> None:
    model, graph, calls = tiny
    plan = Plan.uniform(graph, "keep")
    weights, references = QuantizedWeights(model, graph), [run(model, calls[0])]
    options = [Scheme.parse("uint8-c")]

    linear, scores = price_changes(
        model,
        graph,
        plan,
        around(graph, plan, options, "weights"),
        calls[:1],
        references,
        weights,
        200,
        torch.Generator().manual_seed(0),
    )

    # From full precision the error has no slope, and 8 bits are a step so small that first order is
    # all of it.
    for name in ("conv_out", "blocks.0.ff.0"):
        [measured] = [
            measure_noise(
                model,
                graph,
                Plan.make(graph, {**plan.layers, name: "uint8-c"}),
                calls[:1],
                references,
                weights,
            )
        ]
        assert linear[name]["uint8-c"] == pytest.approx(0.0, abs=1e-9)
        assert float((scores[name]["uint8-c"] ** 2).mean()) == pytest.approx(
            measured, rel=0.4
        )  # 200 probes: 10 % standard error


@pytest.mark.parametrize("seed", range(3))
def test_a_random_plan_is_made_better_within_its_budget(tiny, seed: int) -> None:
    model, graph, calls = tiny
    plan = random_plan(graph, SCHEMES, Budget(average_bits=7.0), seed)

    found = refine(model, graph, plan, SCHEMES, calls, rounds=4, probes=4, seed=seed, seconds=5.0)

    weights, references = QuantizedWeights(model, graph), [run(model, c) for c in calls]
    assert found.noise == pytest.approx(
        measure_noise(model, graph, found.plan, calls, references, weights), rel=1e-5
    )
    assert found.before == pytest.approx(
        measure_noise(model, graph, plan, calls, references, weights), rel=1e-5
    )
    assert found.noise < 0.8 * found.before
    assert found.plan.achieved.average_bits <= 7.0
    assert found.plan.solver.objective == found.noise


def test_the_model_is_left_as_it_was(tiny) -> None:
    model, graph, calls = tiny
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    asked = {n: p.requires_grad for n, p in model.named_parameters()}

    refine(
        model,
        graph,
        random_plan(graph, SCHEMES, Budget(average_bits=7.0), 0),
        SCHEMES,
        calls,
        rounds=1,
        probes=2,
    )

    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad == asked[name]


def test_no_more_layers_are_changed_than_the_radius_allows(tiny) -> None:
    model, graph, calls = tiny
    plan = random_plan(graph, SCHEMES, Budget(average_bits=7.0), 1)

    found = refine(model, graph, plan, SCHEMES, calls, rounds=3, probes=3, radius=2)

    assert max(r.changed for r in found.rounds) <= 2
    kept = [found.before, *(r.measured for r in found.rounds if r.kept)]
    assert kept == sorted(kept, reverse=True)
    assert found.noise == kept[-1]


@pytest.mark.parametrize(
    ("there", "taken"),
    [([0.5, 1.6, 0.9, 0.9], False), ([0.9, 0.95, 0.9, 0.95], True)],
    ids=["by luck", "everywhere"],
)
def test_a_proposal_is_kept_where_it_gains_more_than_its_standard_error(
    tiny, monkeypatch, there: list[float], taken: bool
) -> None:
    model, graph, calls = tiny
    plan = random_plan(graph, SCHEMES, Budget(average_bits=7.0), 1)
    measured = iter([np.ones(4)])
    monkeypatch.setattr(refinement, "_noises", lambda *_: next(measured, np.array(there)))

    found = refine(model, graph, plan, SCHEMES, calls, rounds=1, probes=2)

    assert found.rounds
    assert any(r.kept for r in found.rounds) == taken
    assert (found.plan.layers != plan.layers) == taken


def test_a_plan_without_a_budget_is_refused(tiny) -> None:
    model, graph, calls = tiny

    with pytest.raises(QSearchError, match="refined within a budget; it has none, give one"):
        refine(model, graph, Plan.uniform(graph, "uint4-c"), SCHEMES, calls)


def test_scores_are_one_number_a_probe_and_call(tiny) -> None:
    model, graph, calls = tiny
    references = [run(model, c) for c in calls]

    _, scores = price_changes(
        model,
        graph,
        Plan.uniform(graph, "uint4-c"),
        around(graph, Plan.uniform(graph, "uint4-c"), [Scheme.parse("uint8-c")], "weights"),
        calls,
        references,
        QuantizedWeights(model, graph),
        3,
        torch.Generator(),
    )

    assert {x.shape for row in scores.values() for x in row.values()} == {(6,)}
    assert np.all(scores["conv_out"]["uint4-c"] == 0)


@pytest.mark.parametrize("inputs", ["", "+a8", "+a4"])
def test_changes_before_rounded_inputs_are_priced_straight_through(tiny, inputs: str) -> None:
    model, graph, calls = tiny
    weights, references = QuantizedWeights(model, graph), [run(model, c) for c in calls]
    behind = {x.name: f"keep{inputs}" for x in graph.quantizable if x.name != "conv_in"}
    plan = Plan.make(graph, {x.name: "keep" for x in graph} | behind | {"conv_in": "uint3-c"})
    options = [Scheme.parse("uint2-c")]

    linear, scores = price_changes(
        model,
        graph,
        plan,
        around(graph, plan, options, "weights"),
        calls,
        references,
        weights,
        64,
        torch.Generator().manual_seed(0),
    )
    coarser = plan.replaced(graph, {"conv_in": Scheme.parse("uint2-c")})
    measured = measure_noise(model, graph, coarser, calls, references, weights) - measure_noise(
        model, graph, plan, calls, references, weights
    )

    priced = linear["conv_in"]["uint2-c"] + float((scores["conv_in"]["uint2-c"] ** 2).mean())
    assert 0.5 < priced / measured < 2.0


def ranged(graph, coarse: str, fine: str) -> Plan:
    """A plan whose layers have one scheme in the first half of the steps and another in the
    second.
    """
    return Plan.make(
        graph,
        {x.name: [coarse, fine] if x.quantizable else "keep" for x in graph},
        steps=StepRanges.equal(2),
    )


def test_over_ranges_the_slope_of_a_shared_weight_is_that_of_all_calls(tiny) -> None:
    model, graph, calls = tiny
    plan = ranged(graph, "uint3-c+a4", "uint3-c+a8")
    weights, references = QuantizedWeights(model, graph), [run(model, c) for c in calls]
    options = around(graph, plan, [Scheme.parse("uint4-c")], "weights")
    name = "conv_out"  # behind which nothing is rounded

    linear, _ = price_changes(
        model, graph, plan, options, calls, references, weights, 1, torch.Generator()
    )

    here, there = (weights.get(name, Scheme.parse(s)) for s in ("uint3-c", "uint4-c"))
    errors = []
    for share in (-0.01, 0.01):
        weights._weights[name, "uint3-c", None] = here + share * (there - here)
        errors.append(measure_noise(model, graph, plan, calls, references, weights))
    slope = (errors[1] - errors[0]) / 0.02
    assert linear[name]["uint4-c+a4 | uint4-c+a8"] == pytest.approx(slope, rel=0.03, abs=1e-6)


def test_over_ranges_that_share_nothing_a_range_answers_to_its_own_calls(tiny) -> None:
    model, graph, calls = tiny
    plan = ranged(graph, "uint2-c", "uint4-c")
    weights, references = QuantizedWeights(model, graph), [run(model, c) for c in calls]
    options = around(graph, plan, [Scheme.parse("uint8-c")], "none")

    linear, scores = price_changes(
        model, graph, plan, options, calls, references, weights, 2, torch.Generator()
    )

    row = linear["conv_out"]
    first, second = row["uint8-c | uint4-c"], row["uint2-c | uint8-c"]
    assert first + second == pytest.approx(row["uint8-c"], rel=1e-4, abs=1e-9)
    assert np.all(scores["conv_out"]["uint8-c | uint4-c"][2:] == 0)  # the second call's
    assert np.any(scores["conv_out"]["uint8-c | uint4-c"][:2] != 0)


@pytest.mark.parametrize("share", ["weights", "none"])
def test_a_plan_over_ranges_of_steps_is_made_better_within_its_budget(tiny, share: str) -> None:
    model, graph, calls = tiny
    mixed = ("uint2-c+a6", "uint2-c+a8") if share == "weights" else ("uint2-c+a8", "uint4-c+a8")
    plan = ranged(graph, *mixed)
    limit = 6.0 if share == "weights" else 12.0
    schemes = ("uint3-c+a8", "uint4-c+a8", "uint8-c+a8")

    found = refine(
        model, graph, plan, schemes, calls, budget=Budget(average_bits=limit), share=share,
        rounds=3, probes=4, seconds=5.0,
    )  # fmt: skip

    weights, references = QuantizedWeights(model, graph), [run(model, c) for c in calls]
    measured = measure_noise(model, graph, found.plan, calls, references, weights)
    assert found.noise == pytest.approx(measured, rel=1e-5)
    assert found.noise < 0.8 * found.before
    assert found.plan.achieved.average_bits <= limit
    if share == "weights":
        assert all(len({s.weight_only for s in held}) == 1 for held in found.plan.choices.values())


def test_a_range_that_no_call_lies_in_is_named(tiny) -> None:
    model, graph, calls = tiny

    with pytest.raises(QSearchError, match="range 1 has none: record more bins"):
        refine(
            model, graph, ranged(graph, "uint4-c", "uint4-c+a8"), SCHEMES, calls[:1],
            budget=Budget(average_bits=9.0),
        )  # fmt: skip


def test_what_a_plan_says_of_attention_is_kept(tiny) -> None:
    model, graph, calls = tiny
    site = "blocks.0.attn1:softmax"
    given = {x.name: "uint3-c" if x.quantizable else "keep" for x in graph} | {site: "keep+a8"}
    plan = Plan.make(graph, given, Budget(average_bits=9.0))

    found = refine(model, graph, plan, SCHEMES, calls, rounds=2, probes=4).plan

    assert found.text(site) == "keep+a8"
