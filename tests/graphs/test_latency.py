"""A roofline as a latency table: the sum over a plan is what the costs say of it."""

from __future__ import annotations

import pytest

from qsearch.core.graph import LayerSpec, Op, OpGraph
from qsearch.core.plan import Plan
from qsearch.graphs.costs import device, timings
from qsearch.graphs.latency import roofline


def graph() -> OpGraph:
    """A kept embedding, two linear layers, and an attention between them that no scheme changes."""
    layers = (
        LayerSpec("embed", "embedding", "embedding", (100, 64), 0, quantizable=False, outputs=1024),
        LayerSpec("a", "linear", "linear", (64, 64), 65536, inputs=1024, outputs=1024),
        LayerSpec("b", "linear", "linear", (256, 64), 262144, inputs=1024, outputs=4096),
    )
    ops = tuple(
        Op(x.name, x.kind, x.name, macs=x.macs, inputs=x.inputs, outputs=x.outputs) for x in layers
    )
    return OpGraph(
        "two", layers, (*ops, Op("attention", "attention", macs=40000, inputs=3072, outputs=1024))
    )


@pytest.mark.parametrize("name", ["h200", "cpu"])
def test_a_mixed_plan_takes_what_its_operations_take(name: str) -> None:
    two, on = graph(), device(name)
    table = roofline(two, on, ["uint4-c", "int8-c+a8"])
    layers = {"embed": "keep", "a": "uint4-c", "b": "int8-c+a8"}
    plan = Plan.make(two, layers, latency=table)

    assert plan.achieved.latency == pytest.approx(
        sum(t.seconds for t in timings(two, on, plan.layers)), rel=1e-12
    )
    assert table.rest > 0
    assert set(table.seconds["embed"]) == {"keep"}
    assert set(table.seconds["a"]) == {"keep", "uint4-c", "int8-c+a8"}
