"""Interactions reach the solver: what probes left in a table is what `local` minimises."""

from __future__ import annotations

import numpy as np
import pytest

from qsearch.core.cost import Budget
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.interactions import scores_of
from qsearch.core.probe_responses import ProbeResponses
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.decide.objectives import Objective

SITES, SCHEMES = ("a", "b", "c"), ("uint4-c", "uint8-c")
PROBES, PARTS, ELEMENTS = 64, 3, 16


@pytest.fixture
def graph() -> OpGraph:
    def layer(name: str) -> LayerSpec:
        return LayerSpec(
            name=name,
            kind="Linear",
            role="feed-forward-in",
            weight_shape=(64, 64),
            macs=64 * 64,
            inputs=64,
            block="",
        )

    return OpGraph("three", tuple(layer(n) for n in SITES), (), (), ())


def probed(graph: OpGraph) -> SensitivityTable:
    """`a` and `b` undo each other, `c` alone is quieter than either; two metrics, two bins, one
    probe of one part never measured.
    """
    dice = np.random.default_rng(0)
    choices = tuple((site, scheme) for site in SITES for scheme in SCHEMES)
    values, power = {}, {}
    for metric, size in (("noise", 1.0), ("ssim", 2.0)):
        for step in (0, 1):
            loud, quiet = dice.normal(size=(2, ELEMENTS, PARTS))
            moves = np.stack(
                [size * m * f for m in (loud, -loud, 0.8 * quiet) for f in (1.0, 0.01)]
            )
            signs = dice.choice([-1.0, 1.0], size=(PROBES, ELEMENTS, PARTS))
            found = np.einsum("cep,kep->ckp", moves, signs)[:, None].astype(np.float32)
            found[:, :, -1, 0] = np.nan
            values[metric, step], power[metric, step] = found, dice.uniform(1.0, 2.0, PARTS)
    shares = ProbeResponses(choices, values, power)
    rows = []
    for cell in values:
        for i, (site, scheme) in enumerate(choices):
            value, error = shares.error(cell, [i])
            rows.append(
                {
                    "site": site,
                    "scheme": scheme,
                    "step": cell[1],
                    "metric": cell[0],
                    "estimate": value,
                    "error": error,
                }
            )
            rows[-1] |= {"floor": 0.0, "estimator": "probe", "seed": 0}
    return SensitivityTable.from_rows(graph.id, rows, shares)


@pytest.mark.parametrize(
    "weights", [{"noise": 1.0}, {"ssim": 1.0}, {"noise": 2.0, "ssim": 0.5}], ids=str
)
def test_the_mean_square_of_a_choice_s_scores_is_its_value(
    graph: OpGraph, weights: dict[str, float]
) -> None:
    table = probed(graph)
    assert table.responses is not None

    scores = scores_of(table.responses, weights)
    values = Objective(weights).values(table)

    for site in SITES:
        for scheme in SCHEMES:
            assert (scores[site][scheme] ** 2).mean() == pytest.approx(
                values[site][scheme], rel=0.05
            )  # one probe of 64 is missing in a part of three


def test_local_minimises_what_the_probes_say_of_pairs(graph: OpGraph) -> None:
    table = probed(graph)
    budget = Budget(
        average_bits=6.2
    )  # two of three in 4 bits, with a scale and a zero point for 64 weights

    additive = allocate(graph, table, budget, solver="ilp")
    together = allocate(graph, table, budget, solver="local")

    assert {n for n, s in additive.layers.items() if s.bits == 4} != {"a", "b"}
    assert {n for n, s in together.layers.items() if s.bits == 4} == {"a", "b"}


def test_a_sum_of_decibels_has_no_interactions(graph: OpGraph) -> None:
    table = probed(graph)

    plan = allocate(
        graph, table, Budget(average_bits=6.2), solver="local", objective=Objective(decibels=True)
    )

    assert {n for n, s in plan.layers.items() if s.bits == 4} != {"a", "b"}
