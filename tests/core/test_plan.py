"""Plan and Budget: costs by hand, budgets that hold, files that say what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsearch.core.cost import Budget, cost
from qsearch.core.errors import ArtifactError, InfeasibleBudget, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan, Solver
from qsearch.core.scheme import Scheme

MIXED = {"embed": "keep", "blocks.0.to_q": "int2-c", "blocks.0.ff": "int4-g16+a8", "out": "uint8-t"}
#: stored bits of MIXED on the tiny graph: codes, then scales and zero points
MIXED_BITS = 16 * 240 + (2 * 576 + 24 * 16) + (4 * 40 * 24 + 80 * 16) + (8 * 180 + 32)


def test_costs_are_what_a_pencil_gives(graph: OpGraph) -> None:
    achieved = cost(graph, {name: Scheme.parse(text) for name, text in MIXED.items()})

    assert achieved.bits == MIXED_BITS
    assert achieved.average_bits == MIXED_BITS / 1956
    assert achieved.bytes == (MIXED_BITS + 7) // 8
    assert achieved.bit_operations == 9216 * 2 * 16 + 15360 * 4 * 8 + 11520 * 8 * 16


def test_a_layer_without_a_scheme_is_named(graph: OpGraph) -> None:
    with pytest.raises(QSearchError, match=r"scheme for every layer \(keep is one\); out has none"):
        Plan.make(graph, {k: v for k, v in MIXED.items() if k != "out"})


def test_a_scheme_for_an_unknown_layer_is_answered_with_the_nearest(graph: OpGraph) -> None:
    with pytest.raises(QSearchError, match=r"no layer 'oout'; did you mean 'out'\?"):
        Plan.make(graph, {**MIXED, "oout": "keep"})


def test_a_layer_that_cannot_be_quantized_keeps_its_weight(graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError,
        match=r"embed \(embedding\) can't be quantized; its scheme must be keep, not int4-c",
    ):
        Plan.make(graph, {**MIXED, "embed": "int4-c"})


def test_a_uniform_plan_keeps_what_cannot_be_quantized(graph: OpGraph) -> None:
    plan = Plan.uniform(graph, "int4-c")

    assert {k: str(v) for k, v in plan.layers.items()} == {
        "embed": "keep",
        "blocks.0.to_q": "int4-c",
        "blocks.0.ff": "int4-c",
        "out": "int4-c",
    }


def test_compression_is_counted_from_sixteen_bits(graph: OpGraph) -> None:
    assert Plan.uniform(graph, "keep").compression == 1.0


def test_a_plan_that_breaks_its_budget_is_refused_with_both_numbers(graph: OpGraph) -> None:
    with pytest.raises(
        InfeasibleBudget,
        match=r"average_bits 6\.\d+ above its limit 4, bytes \d+ above its limit 1000",
    ):
        Plan.make(graph, MIXED, Budget(average_bits=4.0, bytes=1000))


def test_a_plan_exactly_at_its_budget_is_accepted(graph: OpGraph) -> None:
    achieved = Plan.make(graph, MIXED).achieved
    budget = Budget(achieved.average_bits, achieved.bytes, achieved.bit_operations)

    assert Plan.make(graph, MIXED, budget).budget == budget


def test_one_byte_less_than_a_plan_takes_is_not_enough(graph: OpGraph) -> None:
    achieved = Plan.make(graph, MIXED).achieved

    assert Budget(bytes=achieved.bytes - 1).excess(achieved) == {
        "bytes": (achieved.bytes - 1, achieved.bytes)
    }


def test_a_budget_without_a_limit_is_refused() -> None:
    with pytest.raises(
        QSearchError, match="at least one limit: average_bits, bytes, bit_operations"
    ):
        Budget()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_budget_must_be_above_zero(limit: float) -> None:
    with pytest.raises(QSearchError, match="a budget must be above zero; average_bits is"):
        Budget(average_bits=limit)


def test_plans_with_the_same_schemes_have_the_same_id_whoever_made_them(
    graph: OpGraph, other_graph: OpGraph
) -> None:
    plan = Plan.make(graph, MIXED)

    assert (
        Plan.make(
            graph, dict(reversed(MIXED.items())), Budget(bytes=10**6), Solver("ilp", "optimal")
        ).id
        == plan.id
    )
    assert Plan.make(graph, {**MIXED, "out": "uint8-c"}).id != plan.id
    assert Plan.make(other_graph, MIXED).id != plan.id


def test_a_plan_comes_back_from_its_file(graph: OpGraph, tmp_path: Path) -> None:
    plan = Plan.make(
        graph, MIXED, Budget(average_bits=8.0), Solver("ilp", "optimal", 0.0, 1.5, 1.5, 0.01)
    )

    plan.save(tmp_path / "plan.json", key="k", parents={"table": "t"}, seed=2)

    loaded = Plan.load(tmp_path / "plan.json", graph)
    assert loaded == plan
    assert loaded.header is not None
    assert (loaded.header.key, loaded.header.parents, loaded.header.seed) == (
        "k",
        {"table": "t"},
        2,
    )


def test_the_file_has_a_line_for_each_layer(graph: OpGraph, tmp_path: Path) -> None:
    Plan.make(graph, MIXED).save(tmp_path / "plan.json")

    lines = [line.strip().rstrip(",") for line in (tmp_path / "plan.json").read_text().splitlines()]
    assert [line for line in lines if line.split(":")[0].strip('"') in MIXED] == [
        f'"{k}": "{v}"' for k, v in MIXED.items()
    ]


def changed(path: Path, section: str, value: Any) -> Path:
    whole = json.loads(path.read_text())
    whole[section] = value
    path.write_text(json.dumps(whole))
    return path


def test_a_plan_whose_layers_were_changed_by_hand_is_refused_with_both_sizes(
    graph: OpGraph, tmp_path: Path
) -> None:
    Plan.make(graph, MIXED).save(tmp_path / "plan.json")

    with pytest.raises(
        ArtifactError,
        match=(
            f"says {MIXED_BITS} stored bits, its layers take {MIXED_BITS + 24 * 24}; it was "
            "changed by hand"
        ),
    ):
        Plan.load(
            changed(tmp_path / "plan.json", "sites", {**MIXED, "blocks.0.to_q": "int3-c"}), graph
        )


def test_a_file_that_counts_incomplete_groups_as_filled_up_loads_and_is_counted_anew(
    graph: OpGraph, tmp_path: Path
) -> None:
    plan = Plan.make(graph, MIXED)
    plan.save(tmp_path / "plan.json")
    achieved = json.loads((tmp_path / "plan.json").read_text())["achieved"]
    filled = MIXED_BITS + 4 * 40 * 8  # rows of 24 in groups of 16

    loaded = Plan.load(
        changed(tmp_path / "plan.json", "achieved", {**achieved, "bits": filled}), graph
    )

    assert loaded == plan
    with pytest.raises(
        ArtifactError,
        match=f"says {filled + 8} stored bits, its layers take {MIXED_BITS}; it was changed",
    ):
        Plan.load(
            changed(tmp_path / "plan.json", "achieved", {**achieved, "bits": filled + 8}), graph
        )


def test_a_plan_whose_budget_was_changed_by_hand_is_refused(graph: OpGraph, tmp_path: Path) -> None:
    Plan.make(graph, MIXED, Budget(average_bits=8.0)).save(tmp_path / "plan.json")

    with pytest.raises(InfeasibleBudget, match="above its limit 2"):
        Plan.load(changed(tmp_path / "plan.json", "budget", {"average_bits": 2.0}), graph)


@pytest.mark.parametrize("section", ["budget", "achieved", "solver", "sites"])
def test_a_file_with_a_broken_section_is_refused(
    graph: OpGraph, tmp_path: Path, section: str
) -> None:
    Plan.make(graph, MIXED).save(tmp_path / "plan.json")

    with pytest.raises(
        ArtifactError, match=r"is not a whole plan .*; make it again with `qsearch allocate`"
    ):
        Plan.load(
            changed(
                tmp_path / "plan.json",
                section,
                {"x": 1} if section != "sites" else 7,
            ),
            graph,
        )


def test_a_plan_of_another_graph_is_refused_with_both_graphs(
    graph: OpGraph, other_graph: OpGraph, tmp_path: Path
) -> None:
    Plan.make(graph, MIXED).save(tmp_path / "plan.json")

    with pytest.raises(
        ArtifactError,
        match=f"was made for graph {graph.id}, the model here is graph {other_graph.id}",
    ):
        Plan.load(tmp_path / "plan.json", other_graph)


def test_broken_ranges_in_a_file_are_refused(graph: OpGraph, tmp_path: Path) -> None:
    Plan.make(graph, MIXED).save(tmp_path / "plan.json")

    for broken in (7.5, {"bounds": [0.5, 0.2]}, {"ranges": 0}, {"bounds": ["a"]}, [0.5]):
        with pytest.raises(QSearchError, match=r"ranges of steps|a number of equal ranges"):
            Plan.load(changed(tmp_path / "plan.json", "steps", broken), graph)
