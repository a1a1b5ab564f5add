"""The page's tables: numbers by hand, the best where it is the best, and costs that a pencil
gives.
"""

from __future__ import annotations

import math

import pytest

from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.report import tables
from tests.report.synthetic import make_plan, make_rows, pixart

GRAPH = pixart()
ROWS = make_rows(GRAPH, make_plan(GRAPH))

#: two layers of the same shape and a small one; bits stored: 4 x 16 codes + 32 x 4 for scales at 4
#: bits
SMALL = OpGraph(
    "m",
    tuple(
        LayerSpec(n, role, "linear", shape, 16)
        for n, role, shape in (("a", "q", (4, 4)), ("b", "k", (4, 4)), ("c", "k", (2, 4)))
    ),
)
NOISE = {
    "a": {"uint2-c": 0.08, "uint4-c": 0.01},
    "b": {"uint2-c": 0.4, "uint4-c": 0.02},
    "c": {"uint2-c": 0.3, "uint4-c": 0.03},
}
TABLE = SensitivityTable.from_rows(
    SMALL.id,
    [
        {
            "site": n,
            "scheme": s,
            "step": 0,
            "metric": "noise",
            "estimate": v,
            "error": 0.0,
            "floor": 0.0,
            "estimator": "sweep",
            "seed": 0,
        }
        for n, found in NOISE.items()
        for s, v in found.items()
    ],
)
PLAN = Plan.make(SMALL, {"a": "uint2-c", "b": "keep", "c": "uint4-c"})


def column(metric: str) -> list[tuple[str, bool]]:
    columns, rows = tables.results(ROWS)
    i = [c.metric for c in columns].index(metric)
    return [row.cells[i] for row in rows]


def test_every_metric_is_a_column_and_says_which_way_is_better() -> None:
    columns, rows = tables.results(ROWS)

    assert [(c.metric, c.up) for c in columns] == [
        ("output_sqnr", True),
        ("sqnr", True),
        ("ssim", True),
        ("frechet", False),
        ("alignment", True),
        ("noise", False),
    ]
    assert [r.plan for r in rows] == ["full precision", "uniform uint4-c", "plan", "random"]


def test_the_best_is_the_highest_where_more_is_better() -> None:
    assert [best for _, best in column("ssim")] == [
        False,
        True,
        False,
        False,
    ]  # full precision does not compete


def test_the_best_is_the_lowest_where_less_is_better() -> None:
    assert [best for _, best in column("frechet")] == [False, False, True, False]


def test_means_stand_with_their_standard_errors() -> None:
    assert [text for text, _ in column("alignment")] == [
        "0.971 ± 0.004",
        "0.934 ± 0.004",
        "0.968 ± 0.004",
        "0.810 ± 0.004",
    ]
    assert column("noise")[2][0] == "7.40e-03 ± 2e-04"


def test_full_precision_is_exact_against_itself() -> None:
    assert [column(m)[0][0] for m in ("sqnr", "output_sqnr", "noise")] == ["exact", "exact", "0"]


def test_a_metric_that_was_not_measured_is_a_dash_and_never_the_best() -> None:
    rows = [
        dict(
            r,
            metrics={
                k: v for k, v in r["metrics"].items() if k != "frechet" or r["plan"] != "plan"
            },
        )
        for r in ROWS
    ]

    columns, found = tables.results(rows)

    i = [c.metric for c in columns].index("frechet")
    assert [row.cells[i][1] for row in found] == [False, True, False, False]
    assert found[2].cells[i] == ("–", False)


def test_a_metric_nobody_knows_has_no_direction_and_no_best() -> None:
    columns, rows = tables.results(
        [dict(r, metrics={"odour": [i, 0.1]}) for i, r in enumerate(ROWS)]
    )

    assert [(c.title, c.up) for c in columns] == [("odour", None)]
    assert [row.cells[0][1] for row in rows] == [False] * 4


def test_the_predicted_noise_of_a_plan_is_the_sum_over_its_layers() -> None:
    assert tables.predicted_noise(TABLE, PLAN) == pytest.approx(0.08 + 0.03, rel=1e-12)


def test_the_predicted_noise_of_schemes_that_were_not_measured_is_no_number() -> None:
    assert math.isnan(tables.predicted_noise(TABLE, Plan.uniform(SMALL, "uint3-c")))


def test_layers_are_ranked_by_the_noise_of_their_cheapest_choice_for_each_bit_it_stores() -> None:
    found = tables.reasons(SMALL, TABLE, PLAN)

    bits = {"a": 2 * 16 + 4 * 32, "b": 2 * 16 + 4 * 32, "c": 2 * 8 + 2 * 32}
    assert (
        [r.layer for r in found]
        == sorted("abc", key=lambda n: -NOISE[n]["uint2-c"] / bits[n])
        == ["c", "b", "a"]
    )
    assert [r.layer for r in tables.reasons(SMALL, TABLE, PLAN, count=2)] == ["c", "b"]


def test_a_reason_says_what_the_next_cheaper_choice_would_cost() -> None:
    c, b, a = tables.reasons(SMALL, TABLE, PLAN)

    assert c.cheaper is not None
    assert (c.cheaper.scheme, c.cheaper.saves) == ("uint2-c", 2 * 8 / 8000)
    assert c.cheaper.sqnr == pytest.approx(-10 * math.log10(0.11 - 0.03 + 0.3), rel=1e-12)
    assert b.cheaper is not None
    assert (b.cheaper.scheme, b.cheaper.saves) == ("uint4-c", (16 * 16 - 4 * 16 - 128) / 8000)
    assert b.cheaper.sqnr == pytest.approx(-10 * math.log10(0.11 + 0.02), rel=1e-12)
    assert a.cheaper is None


def test_a_reason_holds_the_decibels_of_every_scheme_cheapest_first() -> None:
    [first, *_] = tables.reasons(SMALL, TABLE, PLAN)

    assert list(first.decibels) == ["uint2-c", "uint4-c"]
    assert list(first.decibels.values()) == pytest.approx(
        [-10 * math.log10(0.3), -10 * math.log10(0.03)], rel=1e-12
    )


def test_bits_by_role_add_up_to_the_plan() -> None:
    found = tables.bits_by_role(SMALL, TABLE, PLAN, "uint4-c")

    assert [(r.role, r.layers, r.schemes) for r in found] == [
        ("k", 2, (("uint4-c", 1), ("keep", 1))),
        ("q", 1, (("uint2-c", 1),)),
    ]
    assert sum(r.share for r in found) == pytest.approx(1.0, rel=1e-12)
    assert sum(r.share * r.average_bits for r in found) == pytest.approx(
        PLAN.achieved.average_bits, rel=1e-12
    )
    assert found[0].sqnr == pytest.approx(-10 * math.log10(0.025), rel=1e-12)
