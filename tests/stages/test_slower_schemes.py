"""`allocate --device latency.json` without a limit in seconds: schemes that are slower here than
full precision are avoided, where the budget can be met without them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qsearch.core.latency import Latency
from qsearch.core.scheme import KEEP
from qsearch.stages.allocate import allocate
from qsearch.stages.config import parse
from qsearch.stages.folder import Run
from tests.report.synthetic import make_table, pixart
from tests.stages.test_by_hand import Listener, said

GRAPH = pixart(1)
TABLE = make_table(GRAPH)
SCHEMES = sorted(TABLE.frame["scheme"].unique())
SLOW = "uint4-c"


def measured(path: Path, slow: dict[str, float]) -> Path:
    """A latency table on which every scheme takes half as long as keep, but those of `slow`."""
    row = {str(KEEP): 1.0, **{s: slow.get(s, 0.5) for s in SCHEMES}}
    latency = Latency(GRAPH.id, "a made-up core", {layer.name: row for layer in GRAPH})
    latency.save(path / "latency.json")
    return path / "latency.json"


def run(folder: Path, **allocation: object) -> Run:
    content = {"model": "scenes-dit", "folder": str(folder), "allocate": allocation}
    return Run(parse(content, "a test"), Listener())  # type: ignore[arg-type]


def schemes(plan: object) -> set[str]:
    return {str(s) for s in plan.schemes}  # type: ignore[attr-defined]


def test_a_scheme_that_is_slower_here_is_avoided_where_the_budget_allows(tmp_path: Path) -> None:
    device = str(measured(tmp_path, {SLOW: 1.5}))
    whatever = allocate(run(tmp_path / "a", average_bits=5.0), GRAPH, TABLE)
    asked = run(tmp_path / "b", average_bits=5.0, device=device)

    plan = allocate(asked, GRAPH, TABLE)

    assert SLOW in schemes(whatever)
    assert SLOW not in schemes(plan)
    assert plan.achieved.average_bits <= 5.0
    assert "slower on" not in said(asked)


def test_a_budget_that_needs_a_slow_scheme_is_kept_and_the_scheme_named(tmp_path: Path) -> None:
    device = str(measured(tmp_path, {s: 2.0 for s in SCHEMES if s != str(KEEP)}))
    asked = run(tmp_path, average_bits=5.0, device=device)

    plan = allocate(asked, GRAPH, TABLE)

    assert plan.achieved.average_bits <= 5.0
    assert "slower on a made-up core than full precision" in said(asked)
    assert f"{SLOW} (" in said(asked)
    assert "up to 2.0 times" in said(asked)


def test_a_limit_in_seconds_decides_by_itself(tmp_path: Path) -> None:
    device = str(measured(tmp_path, {SLOW: 1.15}))
    seconds = 1.1 * len(GRAPH.layers)

    plan = allocate(run(tmp_path, average_bits=4.0, device=device, latency=seconds), GRAPH, TABLE)

    assert plan.achieved.latency is not None
    assert plan.achieved.latency <= seconds


@pytest.mark.parametrize("slow", [1.05, 1.5])
def test_a_tenth_more_than_full_precision_is_not_slower(tmp_path: Path, slow: float) -> None:
    device = str(measured(tmp_path, {SLOW: slow}))

    plan = allocate(run(tmp_path, average_bits=5.0, device=device), GRAPH, TABLE)

    assert (SLOW in schemes(plan)) == (slow < 1.1)
