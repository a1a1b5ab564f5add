"""Plans that somebody imported or edited: `run` keeps them and says so, `allocate` puts them
aside.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsearch.core.plan import Plan
from qsearch.stages.allocate import allocate
from qsearch.stages.config import parse
from qsearch.stages.folder import Run
from tests.report.synthetic import make_table, pixart

GRAPH = pixart(1)
TABLE = make_table(GRAPH)


class Listener:
    """A `Progress` that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def track(self, title: str, total: int) -> None:
        raise AssertionError("nothing is counted here")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a graph and a table; no model is asked for."""
    content = {"model": "scenes-dit", "folder": str(tmp_path), "allocate": {"average_bits": 6.0}}
    return Run(parse(content, "a test"), Listener())  # type: ignore[arg-type]


def said(run: Run) -> str:
    return "\n".join(run.progress.lines)  # type: ignore[attr-defined]


def edited(path: Path) -> Plan:
    """The plan of a file with another choice at two layers of one shape: nothing in it
    contradicts.
    """
    whole = json.loads(path.read_text())
    names = [layer.name for layer in GRAPH.quantizable]
    shapes = {layer.name: layer.weight_shape for layer in GRAPH}
    sites = whole["sites"]
    a, b = next(
        (a, b) for a in names for b in names if shapes[a] == shapes[b] and sites[a] != sites[b]
    )
    sites[a], sites[b] = sites[b], sites[a]
    path.write_text(json.dumps(whole))
    return Plan.load(path, GRAPH)


def test_a_plan_that_was_made_here_is_up_to_date_the_second_time(run: Run) -> None:
    first = allocate(run, GRAPH, TABLE, keep=True)

    assert allocate(run, GRAPH, TABLE, keep=True) == first
    assert run.progress.lines[-1] == "allocate: plan.json is up to date"  # type: ignore[attr-defined]


def test_run_keeps_an_imported_plan_and_says_so(run: Run) -> None:
    imported = Plan.uniform(GRAPH, "uint4-c")
    imported.save(run.path("plan.json"))

    assert allocate(run, GRAPH, TABLE, keep=True).choices == imported.choices
    assert "was imported or edited by hand, and is kept; `qsearch allocate" in said(run)


def test_run_keeps_a_plan_that_was_edited_by_hand_and_says_so(run: Run) -> None:
    allocate(run, GRAPH, TABLE)
    changed = edited(run.path("plan.json"))

    assert allocate(run, GRAPH, TABLE, keep=True).choices == changed.choices
    assert "was imported or edited by hand, and is kept" in said(run)


@pytest.mark.parametrize("how", ["imported", "edited", "truncated"])
def test_allocate_puts_a_plan_that_it_did_not_make_aside_with_a_word(run: Run, how: str) -> None:
    path = run.path("plan.json")
    made = allocate(run, GRAPH, TABLE)
    if how == "imported":
        Plan.uniform(GRAPH, "uint4-c").save(path)
    elif how == "edited":
        edited(path)
    else:
        path.write_bytes(path.read_bytes()[:100])
    theirs = path.read_bytes()

    again = allocate(run, GRAPH, TABLE)

    assert again.choices == made.choices
    assert path.with_name("plan.before.json").read_bytes() == theirs
    assert "was not made by this command; it is plan.before.json now" in said(run)


def test_another_budget_replaces_a_plan_that_was_made_here(run: Run) -> None:
    allocate(run, GRAPH, TABLE)
    content = {"model": "scenes-dit", "folder": str(run.folder), "allocate": {"average_bits": 4.5}}

    plan = allocate(Run(parse(content, "a test")), GRAPH, TABLE, keep=True)

    assert plan.achieved.average_bits <= 4.5
    assert not run.path("plan.before.json").exists()


def test_a_plan_of_another_graph_that_was_made_here_is_replaced(run: Run) -> None:
    allocate(run, GRAPH, TABLE)
    other = pixart(2)

    allocate(run, other, make_table(other), keep=True)

    assert Plan.load(run.path("plan.json"), other).graph == other.id
    assert not run.path("plan.before.json").exists()
