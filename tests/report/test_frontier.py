"""The frontier's picture: the planned curve and uniform plans as data, then drawn; step-wise plans
and latency tables on the terminal.
"""

from __future__ import annotations

import io
import math
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import Console

from qsearch.core.latency import Latency
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from qsearch.decide.allocation import allocate_frontier
from qsearch.report.frontier import Frontier, draw_frontier, frontier
from qsearch.report.svg import save_svg
from qsearch.report.text import show

from .synthetic import SCHEMES, make_table, pixart

GRAPH = pixart()
TABLE = make_table(GRAPH)
VALUES = {name: {"keep": 0.0, **row} for name, row in TABLE.values().items()}


def test_the_curve_is_the_plans_own_loss_in_decibels_and_uniform_plans_lie_below() -> None:
    plans = allocate_frontier(GRAPH, TABLE, [5.0, 3.5, 8.0])

    data = frontier(GRAPH, VALUES, plans)

    assert list(data.bits) == sorted(p.achieved.average_bits for p in plans)
    assert list(data.quality) == pytest.approx(
        sorted(-10 * math.log10(p.solver.objective or 0.0) for p in plans)
    )
    assert [name for name, *_ in data.uniform] == list(SCHEMES)
    for name, bits, quality in data.uniform:
        assert bits == Plan.uniform(GRAPH, name).achieved.average_bits
        assert quality == pytest.approx(-10 * math.log10(sum(row[name] for row in VALUES.values())))


def test_a_loss_that_is_no_power_is_shown_with_its_sign_turned() -> None:
    plans = allocate_frontier(GRAPH, TABLE, [5.0])

    assert frontier(GRAPH, VALUES, plans, power=False).quality == (
        -(plans[0].solver.objective or 0.0),
    )


def test_the_picture_names_uniform_plans_and_stands_alone(tmp_path: Path) -> None:
    figure = draw_frontier(frontier(GRAPH, VALUES, allocate_frontier(GRAPH, TABLE, [4.0, 6.0])))

    save_svg(tmp_path / "frontier.svg", figure, label="size and loss")

    text = (tmp_path / "frontier.svg").read_text()
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    assert all(name in text for name in SCHEMES)
    assert "var(--" not in text


def test_names_of_points_stand_on_no_other_name_and_inside_the_picture() -> None:
    """Six uniform plans within a bit of each other, on a telephone."""
    close = tuple((f"uint4-g{2**i}", 4.0 + 0.1 * i, 10.0 + 0.4 * i) for i in range(6))
    data = Frontier(
        tuple(2.0 + i for i in range(7)),
        tuple(5.0 + 4 * i for i in range(7)),
        close,
        "dB",
        (("plan", 4.2, 13.5, 0.1),),
    )

    figure = draw_frontier(data, 360)

    figure.draw_without_rendering()
    [ax] = figure.axes
    boxes = [t.get_window_extent() for t in ax.texts]
    assert ax.texts[0].get_text() == "plan"
    assert len(boxes) == 7
    assert [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b.padded(-2))] == []
    assert all(ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 + 2 for box in boxes)


def shown(path: Path) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for part in show(path):
        console.print(part)
    return " ".join(console.export_text().split())


def test_a_step_wise_plan_is_shown_bin_by_bin(tmp_path: Path) -> None:
    layers = {x.name: ("uint4-c", "uint8-c") if x.quantizable else ("keep", "keep") for x in GRAPH}
    Plan.make(GRAPH, layers, steps=StepRanges.equal(2)).save(tmp_path / "plan.json")

    text = shown(tmp_path / "plan.json")

    assert "steps 50% to 100%" in text
    assert "every copy counted" in text


def test_a_latency_table_is_shown_in_milliseconds(tmp_path: Path) -> None:
    Latency(GRAPH.id, "a clock", {x.name: {"keep": 0.0025} for x in GRAPH}, 0.001).save(
        tmp_path / "latency.json"
    )

    text = shown(tmp_path / "latency.json")

    assert "2.5" in text
    assert "1 ms that no scheme changes" in text
