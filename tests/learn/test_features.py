"""Features: amounts that add up, the same columns for every architecture, and plans that do not
belong are refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.format_words import families
from qsearch.core.plan import Plan
from qsearch.learn.contracts import small_graph, small_plans, small_table
from qsearch.learn.features import (
    BLOCKS,
    FLOOR,
    ROLES,
    block_group,
    featurize,
    role_group,
)
from tests.conftest import make_graph


def test_nothing_done_is_zero_everywhere() -> None:
    graph = small_graph()

    found = featurize(graph, {"keep": Plan.uniform(graph, "keep")}, [small_table(graph)])

    for name, value in zip(found.columns, found.values[0], strict=True):
        assert value == pytest.approx(FLOOR if name.startswith("noise/") else 0.0), name


def test_every_architecture_has_the_same_columns() -> None:
    graphs = [small_graph(), small_graph(blocks=5, width=8), make_graph()]

    columns = {featurize(g, {"p": Plan.uniform(g, "uint4-c")}).columns for g in graphs}

    assert len(columns) == 1


def test_parts_add_up_to_the_whole() -> None:
    graph = small_graph()
    found = featurize(graph, small_plans(graph, 6), [small_table(graph)])

    def power(prefix: str) -> np.ndarray:
        return sum(
            10 ** (found.column(c) / 10) - 10 ** (FLOOR / 10)
            for c in found.columns
            if c.startswith(prefix)
        )

    whole = power("noise/sum")
    for part in ("noise/role:", "noise/block:", "noise/depth:", "noise/share:", "noise/step:"):
        np.testing.assert_allclose(
            power(part) / (2 if part == "noise/step:" else 1), whole, rtol=1e-4
        )
    lost = [
        sum(found.column(c) for c in found.columns if c.startswith(f"lost/{part}:"))
        for part in ("role", "block", "depth")
    ]
    np.testing.assert_allclose(lost[0], lost[1], rtol=1e-5)
    np.testing.assert_allclose(lost[0], lost[2], rtol=1e-5)
    np.testing.assert_allclose(sum(found.column(f"share/{f}") for f in families()), 1.0, rtol=1e-5)


def test_the_prior_is_the_table_s_prediction_with_interactions() -> None:
    graph = small_graph()
    table, plans = small_table(graph), small_plans(graph, 4)

    found = featurize(graph, plans, [table])

    expected = [
        10 * math.log10(table.predict(plan)[0] + 10 ** (FLOOR / 10)) for plan in plans.values()
    ]
    np.testing.assert_allclose(found.column("noise/plan"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("role", "group"),
    [
        ("self-attention-q", "self-attention-q"),
        ("joint-attention-add-k", "joint-attention-k"),
        ("self-attention-qkv", "attention-fused"),
        ("pooling-attention-out", "attention-rest"),
        ("projection-in", "projection"),
        ("label-embedding", "embedding-rest"),
        ("router", "rest"),
    ],
)
def test_a_role_has_its_group(role: str, group: str) -> None:
    assert role_group(role) == group
    assert group in ROLES


def test_a_block_of_any_kind_has_its_group() -> None:
    assert [
        block_group(k) for k in ("resnet", "text-embedding", "patchify", "pooling-attention")
    ] == ["resnet", "embedding", "ends", "rest"]
    assert set(map(block_group, BLOCKS)) == set(BLOCKS)


def test_a_plan_that_lacks_a_layer_is_refused() -> None:
    graph = small_graph()
    plan = Plan.uniform(graph, "uint4-c")
    some = replace(plan, choices={k: v for k, v in plan.choices.items() if k != "last"})

    with pytest.raises(QSearchError, match="p has none for last"):
        featurize(graph, {"p": some})


def test_a_plan_of_another_graph_is_refused() -> None:
    with pytest.raises(QSearchError, match="plan p is for graph"):
        featurize(small_graph(), {"p": Plan.uniform(small_graph(width=8), "uint4-c")})


def test_a_choice_that_the_table_has_not_priced_is_named() -> None:
    graph = small_graph()

    with pytest.raises(QSearchError, match="the table has no e2m1-g64 for first"):
        featurize(graph, {"p": Plan.uniform(graph, "e2m1-g64")}, [small_table(graph)])
