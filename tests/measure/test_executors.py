"""Every executor does every part once, the same way: local, a pool of processes, Ray's actors."""

from __future__ import annotations

import os
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qsearch.core import plugins
from qsearch.core.artifacts import versions
from qsearch.core.errors import QSearchError
from qsearch.measure.executing import ExecutorOptions, Task, WorkerLost, execute
from tests.conftest import Command
from tests.measure.executor_tasks import dying, refusing, squares, summing

EXECUTORS = plugins.names("executors", outside=False)
#: those whose workers are processes of their own
APART = [name for name in EXECUTORS if name != "local"]


def options(name: str, request: pytest.FixtureRequest) -> ExecutorOptions:
    """Two workers, one of `local`; with Ray's there to work."""
    if name == "ray":
        request.getfixturevalue("ray_here")
    return ExecutorOptions(executor=name, workers=1 if name == "local" else 2)


@pytest.mark.filterwarnings("ignore")  # of Ray, in its own threads
@pytest.mark.parametrize("name", EXECUTORS)
class TestEveryExecutor:
    """The contract of a file in `measure/executors/`."""

    def test_does_every_part_once_also_those_that_are_added_meanwhile(
        self, name: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        asked, parts, found = options(name, request), deque([1, 2, 3, 4]), {}

        for part, (square, threads, process) in execute(
            Task(partial(squares, str(tmp_path))), parts, asked
        ):
            assert part not in found
            found[part] = square
            assert threads == 1
            assert (process == os.getpid()) == (name == "local")
            if part < 3:
                parts.append(part + 10)

        assert found == {n: n * n for n in (1, 2, 3, 4, 11, 12)}
        assert 1 <= len([*tmp_path.iterdir()]) <= (asked.workers or 1)  # begun once each
        assert not parts

    def test_says_a_mistake_of_a_worker_as_it_is(
        self, name: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        task = Task(partial(squares, str(tmp_path)))

        with pytest.raises(QSearchError) as caught:
            list(execute(task, deque([1, -3]), options(name, request)))

        assert str(caught.value) == "a part is not below zero; given -3"

    def test_ends_with_the_reason_where_no_worker_can_begin(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        with pytest.raises(QSearchError, match="nothing/here holds no pipeline"):
            list(execute(Task(refusing), deque([1, 2]), options(name, request)))

    def test_sums_are_the_same_to_the_last_digit_wherever_they_are_made(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        here = dict(execute(Task(summing), deque(range(4)), ExecutorOptions()))

        found = dict(execute(Task(summing), deque(range(4)), options(name, request)))

        assert found == here

    def test_nothing_to_do_is_done(self, name: str, request: pytest.FixtureRequest) -> None:
        assert list(execute(Task(refusing), deque(), ExecutorOptions(executor=name))) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", APART)
def test_workers_with_other_versions_are_refused_with_both(
    name: str, request: pytest.FixtureRequest
) -> None:
    task = Task(summing, versions={**versions(), "torch": "1.13.1"})

    with pytest.raises(QSearchError) as caught:
        list(execute(task, deque([1]), options(name, request)))

    assert f"has torch {versions()['torch']}, there it is 1.13.1" in str(caught.value)


def test_a_killed_process_of_a_pool_ends_the_work_in_words(tmp_path: Path) -> None:
    asked = ExecutorOptions(executor="pool", workers=2)

    with pytest.raises(WorkerLost, match="a worker was killed"):
        list(execute(Task(partial(dying, str(tmp_path))), deque(range(4)), asked))


@pytest.mark.filterwarnings("ignore")
def test_ray_begins_a_killed_worker_again_and_does_its_part(tmp_path: Path, ray_here: None) -> None:
    asked = ExecutorOptions(executor="ray", workers=2)

    found = dict(execute(Task(partial(dying, str(tmp_path))), deque(range(4)), asked))

    assert found == {n: n * n for n in range(4)}
    assert (tmp_path / "died").exists()


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(QSearchError, match=r"`pip install ray`"):
        list(execute(Task(summing), deque([1]), ExecutorOptions(executor="ray")))


def test_an_address_that_no_head_answers_is_one_line() -> None:
    pytest.importorskip("ray")
    asked = ExecutorOptions(executor="ray", address="127.0.0.1:9")

    with pytest.raises(QSearchError, match=r"no head of Ray answers at 127\.0\.0\.1:9"):
        list(execute(Task(summing), deque([1]), asked))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--executor", "rey"), "no plug-in 'rey' among the executors; did you mean 'ray'?"),
        (("--workers", "0"), "greater than or equal to 1; given 0"),
        (("--executor", "pool", "--address", "auto"), "--address is of Ray's head"),
        (("--executor", "local", "--workers", "2"), "local is one worker; given 2"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_options_that_do_not_go_together_are_one_line(
    arguments: tuple[str, ...], said: str
) -> None:
    from qsearch.cli.common import executor_options

    given: dict[str, Any] = dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(QSearchError) as caught:
        asked = executor_options(
            given.get("--executor"),
            int(given["--workers"]) if "--workers" in given else None,
            given.get("--address"),
            1,
        )
        list(execute(Task(summing), deque([1]), asked))
    assert said in str(caught.value)


def test_executors_are_listed(command: Command) -> None:
    code, out, _ = command("list", "executors")

    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["local", "pool", "ray"]
