"""Constraints that hold, contradictions that name the pair, and limits that can't be kept
together.
"""

from __future__ import annotations

from typing import Any

import pytest

from qsearch.core.cost import Budget
from qsearch.core.errors import InfeasibleBudget, QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.latency import Latency
from qsearch.decide.allocation import allocate
from qsearch.decide.constraints import Constraints, fused
from qsearch.decide.objectives import Objective, predictions

from .test_allocation import make_table, random_noise

SCHEMES = ("uint2-c", "uint4-c", "int8-c")


def attention(context: int = 24) -> OpGraph:
    """Self- and cross-attention and a feed-forward; the context is as wide as asked."""
    layers = [
        LayerSpec(f"block.attn1.to_{p}", f"self-attention-{p}", "linear", (24, 24), 9000, "block")
        for p in "qkv"
    ]
    layers += [
        LayerSpec(
            f"block.attn2.to_{p}",
            f"cross-attention-{p}",
            "linear",
            (24, 24 if p == "q" else context),
            9000,
            "block",
        )
        for p in "qkv"
    ]
    return OpGraph(
        "attention",
        (*layers, LayerSpec("block.ff", "feed-forward-in", "linear", (96, 24), 36000, "block")),
    )


def plan(graph: OpGraph, bits: float = 5.0, **constraints: Any) -> dict[str, str]:
    table = make_table(graph, random_noise(graph, 1, SCHEMES))
    return {
        n: str(s)
        for n, s in allocate(
            graph, table, Budget(average_bits=bits), constraints=Constraints(**constraints)
        ).layers.items()
    }


def test_tied_layers_get_one_scheme() -> None:
    found = plan(
        attention(),
        tied=[("block.attn1.to_q", "block.attn1.to_k"), ("block.attn1.to_k", "block.ff")],
    )

    assert len({found[n] for n in ("block.attn1.to_q", "block.attn1.to_k", "block.ff")}) == 1
    assert len(set(found.values())) > 1


def test_fused_ties_what_reads_one_input() -> None:
    assert fused(attention()) == [
        tuple(f"block.attn1.to_{p}" for p in "qkv"),
        ("block.attn2.to_k", "block.attn2.to_v"),
    ]


def test_tied_layers_that_read_rows_of_different_widths_are_refused_by_name() -> None:
    with pytest.raises(
        QSearchError,
        match=r"must read rows of one width; block.attn2.to_q reads 24, block.attn2.to_k reads 32",
    ):
        plan(attention(32), tied=[("block.attn2.to_q", "block.attn2.to_k")])


def test_protected_layers_are_kept() -> None:
    found = plan(attention(), bits=12.0, protected=["block.ff", "cross-attention-k"])

    assert found["block.ff"] == found["block.attn2.to_k"] == "keep"


def test_only_allowed_schemes_are_used() -> None:
    found = plan(attention(), bits=16.0, allowed={"self-attention-*": ["int8-c"]})

    assert {found[f"block.attn1.to_{p}"] for p in "qkv"} == {"int8-c"}
    assert found["block.ff"] == "keep"


def test_so_many_formats_are_enough() -> None:
    formats = [len(set(plan(attention(), bits=6.0, formats=n).values()) - {"keep"}) for n in (1, 2)]

    assert formats[0] == 1
    assert formats[1] <= 2


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            {"protected": ["block.ff"], "allowed": {"feed-forward-*": ["uint4-c"]}},
            (
                r"two rules for block.ff contradict each other: protected 'block.ff'; and allowed "
                r"'feed-forward-\*': uint4-c"
            ),
        ),
        (
            {"allowed": {"block.ff": ["uint5-c"]}},
            (
                r"contradict each other: what is measured for it: .*uint4-c; and allowed "
                r"'block.ff': uint5-c"
            ),
        ),
        (
            {
                "protected": ["block.attn1.to_q"],
                "allowed": {"block.attn1.to_k": ["uint2-c"]},
                "fused": True,
            },
            (
                "block.attn1.to_q and block.attn1.to_k are tied and have no scheme in common: "
                "keep; and uint2-c"
            ),
        ),
        (
            {"protected": ["block.gg"]},
            r"'block.gg' matches nothing in attention; did you mean 'block'\?",
        ),
        ({"tied": [("block.ff", "block.gg")]}, r"no layer 'block.gg'; did you mean 'block.ff'\?"),
        ({"allowed": {"block.ff": []}}, "need at least one allowed scheme"),
        ({"formats": -1}, "at least 0 formats"),
    ],
)
def test_rules_that_can_t_hold_are_refused_by_name(
    constraints: dict[str, Any], message: str
) -> None:
    with pytest.raises(QSearchError, match=message):
        plan(attention(), **constraints)


def test_protecting_more_than_the_budget_allows_says_what_can_be_reached() -> None:
    with pytest.raises(
        InfeasibleBudget,
        match=r"no plan reaches average_bits 4; the least with these choices is (\d+\.\d+)",
    ):
        plan(attention(), bits=4.0, protected=["block.ff"])


def test_two_limits_that_exclude_each_other_are_named_with_the_best_of_one() -> None:
    graph = attention()
    table = make_table(graph, random_noise(graph, 1, SCHEMES))
    # Fewest bits are slow here, as where a kernel for them is missing.
    latency = Latency(
        graph.id,
        "a clock",
        {x.name: {"uint2-c": 3.0, "uint4-c": 2.0, "int8-c": 1.0, "keep": 1.5} for x in graph},
    )

    with pytest.raises(
        InfeasibleBudget,
        match=(
            r"no plan keeps average_bits 4 and latency 8 at once; with average_bits kept the least "
            r"latency is 1\d"
        ),
    ):
        allocate(graph, table, Budget(average_bits=4.0, latency=8.0), latency=latency)


def test_formats_count_among_the_limits_that_exclude_each_other() -> None:
    graph = attention()
    table = make_table(graph, random_noise(graph, 1, SCHEMES))
    rules = Constraints(
        allowed={"block.ff": ["uint4-c"], "block.attn1.to_q": ["uint2-c"]}, formats=1
    )

    with pytest.raises(InfeasibleBudget, match="formats"):
        allocate(graph, table, Budget(average_bits=9.0), constraints=rules)


def test_three_limits_that_only_together_exclude_each_other_are_all_named() -> None:
    graph = OpGraph("one", (LayerSpec("a", "linear", "linear", (64, 64), 4096),))
    table = make_table(graph, {"a": {"uint2-c": 0.3, "uint4-c": 0.2, "uint8-c": 0.1}})
    rows = table.frame.copy()
    rows["metric"], rows["estimate"] = "lost", [0.0, 2.0, 1.0]
    import pandas as pd

    both = type(table)(table.graph, pd.concat([table.frame, rows]))
    latency = Latency(
        graph.id, "a clock", {"a": {"uint2-c": 9.0, "uint4-c": 1.0, "uint8-c": 1.0, "keep": 9.0}}
    )

    with pytest.raises(InfeasibleBudget, match="though each two of them go together"):
        allocate(
            graph,
            both,
            Budget(average_bits=6.0, latency=5.0),
            latency=latency,
            objective=Objective(at_most={"lost": 1.5}),
        )


# --------------------------------------------------------------------------------------- objectives


def test_a_metric_can_be_a_limit() -> None:
    graph = attention()
    noise, lost = random_noise(graph, 2, SCHEMES), random_noise(graph, 3, SCHEMES)
    table, other = make_table(graph, noise), make_table(graph, lost)
    import pandas as pd

    both = type(table)(graph.id, pd.concat([table.frame, other.frame.assign(metric="alignment")]))

    def loss(objective: Objective) -> float:
        found = allocate(graph, both, Budget(average_bits=5.0), objective=objective)
        return sum(lost[n].get(str(s), 0.0) for n, s in found.layers.items())

    free = loss(Objective())
    assert loss(Objective(at_most={"alignment": 0.7 * free})) <= 0.7 * free < free
    assert loss(Objective({"noise": 1.0, "alignment": 1e6})) < free


def test_decibels_are_what_mixdq_sums() -> None:
    graph = attention()
    noise = random_noise(graph, 2, SCHEMES)

    values = Objective(decibels=True).values(make_table(graph, noise))

    import math

    for name, row in noise.items():
        assert values[name]["uint4-c"] == pytest.approx(10 * math.log10(row["uint4-c"]))
        assert values[name]["keep"] == -120.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": {}}, "at least one metric"),
        ({"weights": {"noise": -1.0}}, "not below zero, since every metric is a loss"),
        ({"at_most": {"noise": -0.1}}, "at or above zero"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(QSearchError, match=message):
        Objective(**given)


def test_what_a_surrogate_predicts_can_be_minimised_without_a_table() -> None:
    graph = attention()
    values = predictions(
        graph, SCHEMES, lambda layer, scheme: (100.0 if layer == "block.ff" else 1.0) / scheme.bits
    )

    found = allocate(graph, values, Budget(average_bits=9.0))

    assert found.layers["block.ff"].bits == max(s.bits for s in found.layers.values())
    with pytest.raises(
        QSearchError, match=r"a predicted loss must be a number; uint2-c at block.attn1.to_q is nan"
    ):
        predictions(graph, SCHEMES, lambda layer, scheme: float("nan"))
