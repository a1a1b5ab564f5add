"""Frontiers of a run: budgets that the run's schemes can reach."""

from __future__ import annotations

import pytest

from qsearch.core.errors import InfeasibleBudget
from qsearch.core.graph import OpGraph
from qsearch.core.table import SensitivityTable
from qsearch.stages.allocate import AllocateSettings
from qsearch.stages.frontier import FRONTIER, LARGE, make_frontier
from tests.report.synthetic import pixart

GRAPH = pixart(2)


def table_of(graph: OpGraph, *schemes: str) -> SensitivityTable:
    """A table whose noise falls with the schemes' place."""
    return SensitivityTable.from_rows(
        graph.id,
        [
            {
                "site": layer.name,
                "scheme": scheme,
                "estimate": 0.1 / (i + 1),
                "step": 0,
                "metric": "noise",
                "error": 0.0,
                "floor": 0.0,
                "estimator": "sweep",
                "seed": 0,
            }
            for layer in graph.quantizable
            for i, scheme in enumerate(schemes)
        ],
    )


@pytest.mark.parametrize(
    ("schemes", "asked"),
    [(("uint2-c", "uint4-c", "uint8-c"), FRONTIER), (("int8-g16",), LARGE)],
)
def test_a_frontier_has_the_sizes_that_can_be_reached(
    schemes: tuple[str, ...], asked: tuple[float, ...]
) -> None:
    plans = make_frontier(AllocateSettings(), GRAPH, table_of(GRAPH, *schemes))

    found = [plan.budget.average_bits or 0.0 for plan in plans if plan.budget]
    assert len(found) > 5
    assert set(found) <= set(asked)
    for plan, limit in zip(plans, found, strict=True):
        assert plan.achieved.average_bits <= limit


def test_sizes_that_were_asked_for_and_can_t_be_reached_are_refused() -> None:
    with pytest.raises(InfeasibleBudget):
        make_frontier(AllocateSettings(), GRAPH, table_of(GRAPH, "int8-g16"), [4.0, 5.0])
