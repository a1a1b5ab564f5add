"""Claims: one worker holds a plan, a living one keeps it, a dead one's lapses; in every storage."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from qsearch.core import claims as module
from qsearch.core.claims import Claims
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.storage import connect, place_of
from qsearch.core.trials import Trials

LAPSE = 0.6
#: holds the claim on "plan" in the storage argv[1] until it is killed
HOLDER = """
import sys, time
from qsearch.core.claims import Claims
from qsearch.core.storage import connect, place_of
with Claims(connect(place_of(sys.argv[1])), 0.6).held("plan") as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def claims(where: str) -> Claims:
    return Claims(connect(place_of(where)), LAPSE)


def holder(where: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, where], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_one_of_two_holds_a_plan_and_the_other_has_it_after(where: str) -> None:
    one, other = claims(where), claims(where)

    with one.held("plan") as first, other.held("plan") as second, other.held("another") as third:
        assert (first, second, third) == (True, False, True)
    with other.held("plan") as again:
        assert again


def test_of_many_at_once_exactly_one_holds(where: str) -> None:
    everyone = [claims(where) for _ in range(6)]

    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        asked = [claim.held("plan") for claim in everyone]
        found = list(pool.map(lambda one: one.__enter__(), asked))
        for one in asked:
            stack.push(one.__exit__)

    assert sorted(found) == [False] * 5 + [True]


def test_the_claim_of_a_killed_process_of_this_machine_is_over(where: str) -> None:
    process = holder(where)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()

    with claims(where).held("plan") as mine:
        assert mine


def test_a_claim_of_another_machine_lapses_when_it_stands_still(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, clock = holder(where), [0.0]
    monkeypatch.setattr(module, "_machine", lambda: "somewhere else")
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    mine, beat = claims(where), -1

    for _ in range(4):  # longer than a lapse, and it beats
        _wait_for_beat(mine, beat)
        assert not _held(mine)
        beat = _beat(mine)  # no older than the one that was looked at
        clock[0] += 0.9 * LAPSE
    _wait_for_beat(mine, beat)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()

    assert not _held(mine)  # it has beaten since the last look
    clock[0] += 0.9 * LAPSE
    assert not _held(mine)
    clock[0] += 0.2 * LAPSE
    assert _held(mine)


def _held(mine: Claims) -> bool:
    with mine.held("plan") as got:
        return got


def _beat(mine: Claims) -> int:
    return max(claim.user_attrs["beat"] for claim in mine._running())


def _wait_for_beat(mine: Claims, known: int) -> None:
    """Until the holder has beaten again."""
    limit = time.monotonic() + 600
    while _beat(mine) <= known:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_whoever_was_thought_dead_ends_without_a_word(where: str) -> None:
    one, other = claims(where), claims(where)

    with one.held("plan") as mine:
        assert mine
        (claim,) = one._running()
        other._end(claim)
        with other.held("plan") as now:
            assert now


def test_claims_are_no_trials(graph: OpGraph, where: str) -> None:
    trials = Trials(where, graph)
    plan = Plan.uniform(graph, "int4-c")

    with trials.claims(LAPSE).held(f"{plan.id} s") as mine:
        assert mine
        assert not trials.knows(plan.id, "s", stopped=True)
        trials.add("a", plan, {"noise": (0.5, 0.1)}, "s", stopped=True)

    assert [t.name for t in Trials(where, graph).all()] == ["a"]
    assert trials.knows(plan.id, "s", stopped=True)
    assert not trials.knows(plan.id, "s", stopped=False)
    assert not trials.knows(plan.id, "t", stopped=True)


def test_a_process_id_that_another_process_has_now_is_not_the_one_that_claimed() -> None:
    here: dict[str, Any] = module._here()

    assert not module._ended(here)
    assert module._ended({**here, "began": "1"})
    assert not module._ended({**here, "machine": "somewhere else", "began": "1"})
