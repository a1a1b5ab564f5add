"""Latency tables, and budgets in them: sums by hand, files that come back, and what is missing said
by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qsearch.core.cost import Budget, cost, select
from qsearch.core.errors import ArtifactError, InfeasibleBudget, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.latency import Latency
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme


def table(graph: OpGraph) -> Latency:
    """4 bits take a quarter of full precision's time, 8 bits a half; a second of rest."""
    return Latency(
        graph.id,
        "a clock",
        {
            x.name: {"keep": 4.0, "uint8-c": 2.0, "uint4-c": 1.0}
            if x.quantizable
            else {"keep": 4.0}
            for x in graph
        },
        1.0,
    )


def test_a_plan_takes_the_sum_over_its_layers_and_the_rest(graph: OpGraph) -> None:
    plan = Plan.make(
        graph,
        {"embed": "keep", "blocks.0.to_q": "uint4-c", "blocks.0.ff": "uint8-c", "out": "keep"},
        latency=table(graph),
    )

    assert plan.achieved.latency == 1 + 4 + 1 + 2 + 4


def test_a_plan_above_its_time_is_refused_with_both_numbers(graph: OpGraph) -> None:
    with pytest.raises(InfeasibleBudget, match=r"latency 11 above its limit 10\.5"):
        Plan.make(
            graph,
            Plan.uniform(graph, "uint8-c").layers,
            Budget(latency=10.5),
            latency=table(graph),
        )


def test_a_budget_in_time_needs_a_table(graph: OpGraph) -> None:
    with pytest.raises(QSearchError, match="a budget in latency needs a latency table"):
        Plan.make(graph, Plan.uniform(graph, "uint8-c").layers, Budget(latency=10.5))


def test_a_scheme_that_was_not_timed_is_answered_with_those_that_were(graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError,
        match=r"latency table of a clock has no uint3-c for blocks.0.to_q; did you mean 'uint",
    ):
        Plan.make(graph, Plan.uniform(graph, "uint3-c").layers, latency=table(graph))


def test_a_table_of_another_graph_is_refused(graph: OpGraph, other_graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError,
        match=f"latency table was made for graph {graph.id}, wider is graph {other_graph.id}",
    ):
        cost(other_graph, Plan.uniform(other_graph, "keep").layers, latency=table(graph))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(graph: OpGraph, seconds: float) -> None:
    with pytest.raises(
        QSearchError, match="a time must be finite and not below zero; out at uint4-c has"
    ):
        Latency(graph.id, "a clock", {"out": {"uint4-c": seconds}})


def test_a_table_comes_back_from_its_file(graph: OpGraph, tmp_path: Path) -> None:
    table(graph).save(tmp_path / "latency.json")

    assert Latency.load(tmp_path / "latency.json", graph.id) == table(graph)
    with pytest.raises(ArtifactError, match="was made for graph"):
        Latency.load(tmp_path / "latency.json", "another")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"seconds"', '"hours"'), ("2.0", '"two"'), ("uint4-c", "uint4-z"), ("1.0", "-1.0")],
)
def test_a_table_that_was_changed_by_hand_is_refused(
    graph: OpGraph, tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "latency.json"
    table(graph).save(path)
    path.write_text(path.read_text().replace(old, new))

    with pytest.raises(QSearchError):
        Latency.load(path, graph.id)


def test_a_plan_keeps_its_time_in_its_file_and_is_timed_again_where_a_table_is_given(
    graph: OpGraph, tmp_path: Path
) -> None:
    plan = Plan.make(
        graph, Plan.uniform(graph, "uint8-c").layers, Budget(latency=11.0), latency=table(graph)
    )
    plan.save(tmp_path / "plan.json")
    slow = Latency(graph.id, "another clock", table(graph).seconds, 2.0)

    assert Plan.load(tmp_path / "plan.json", graph).achieved.latency == 11.0
    with pytest.raises(InfeasibleBudget, match="latency 12 above its limit 11"):
        Plan.load(tmp_path / "plan.json", graph, latency=slow)


# --------------------------------------------------------------------------------- groups of layers


def test_a_group_is_counted_alone(graph: OpGraph) -> None:
    budget = Budget(
        groups={"blocks.0": {"average_bits": 16.0}, "out": {"bytes": 360, "bit_operations": 1e9}}
    )

    plan = Plan.make(graph, Plan.uniform(graph, "keep").layers, budget)

    assert plan.achieved.groups["blocks.0"]["average_bits"] == 16.0
    assert plan.achieved.groups["out"]["bytes"] == 2 * 180
    assert plan.achieved.groups["out"]["bit_operations"] == 11520 * 256


def test_a_group_above_its_limit_is_refused_by_name(graph: OpGraph) -> None:
    with pytest.raises(InfeasibleBudget, match=r"bytes of 'out' 360 above its limit 359"):
        Plan.make(graph, Plan.uniform(graph, "keep").layers, Budget(groups={"out": {"bytes": 359}}))


def test_a_plan_with_groups_comes_back_from_its_file(graph: OpGraph, tmp_path: Path) -> None:
    plan = Plan.make(
        graph,
        Plan.uniform(graph, "uint4-c").layers,
        Budget(average_bits=9.0, groups={"blocks.*": {"average_bits": 6.0}}),
    )

    plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json", graph) == plan


@pytest.mark.parametrize("pattern", ["out", "outp?t", "conv2d-not", "blocks.0.*"])
def test_a_pattern_matches_names_roles_and_blocks_or_is_an_error(
    graph: OpGraph, pattern: str
) -> None:
    if pattern == "conv2d-not":
        with pytest.raises(QSearchError, match="'conv2d-not' matches nothing in tiny"):
            select(graph, pattern)
    else:
        assert [x.name for x in select(graph, pattern)] == {
            "blocks.0.*": ["blocks.0.to_q", "blocks.0.ff"]
        }.get(pattern, ["out"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"out": {"latency": 1.0}}, "can't be limited in 'latency'"),
        ({"out": {"bits": 1}}, "did you mean"),
    ],
)
def test_a_group_can_be_limited_in_what_belongs_to_layers(
    groups: dict[str, dict[str, float]], message: str
) -> None:
    with pytest.raises(QSearchError, match=message):
        Budget(groups=groups)


def test_activations_are_counted_at_their_bits(graph: OpGraph) -> None:
    whole = cost(graph, Plan.uniform(graph, "keep").layers).activation_bytes
    less = cost(
        graph, {x.name: Scheme.parse("keep+a8" if x.quantizable else "keep") for x in graph}
    ).activation_bytes

    assert whole == sum(2 * x.inputs for x in graph)
    assert less == sum((1 if x.quantizable else 2) * x.inputs for x in graph)
