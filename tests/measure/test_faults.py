"""A process that dies while it measures plans loses nothing and makes nothing twice: PostgreSQL,
Ray on two nodes.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Sampling, example_inputs, record, scene_prompts
from qsearch.measure.plan_evaluation import measure_plans
from tests.databases import AbstractServer, PostgreSQL
from tests.databases import server as new_server
from tests.measure.evaluation_process import ONCE, PLANS, Command, plans, stored, task, values
from tests.models import tiny_pipeline
from tests.ray_cluster import Cluster, cluster

pytestmark = pytest.mark.slow
#: a copy of the pipeline that the second node does not see
HIDDEN = "hidden"


@pytest.fixture(scope="module")
def server() -> Iterator[AbstractServer]:
    if PostgreSQL.binaries() is None:
        pytest.skip(PostgreSQL.missing)
    pytest.importorskip("psycopg")
    with new_server() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with its graph."""
    made, pipe = tmp_path_factory.mktemp("task"), tiny_pipeline()
    pipe.save_pretrained(made / "pipe")
    shutil.copytree(made / "pipe", made / HIDDEN)
    (call,) = record(pipe, scene_prompts(1, 0), Sampling(steps=2, seed=3), 1)
    extract(pipe.unet, example_inputs(call, pipe.unet)).save(made / "graph.json")
    return made


@pytest.fixture(scope="module")
def ray(folder: Path) -> Iterator[Cluster]:
    """Two nodes of a core each, for all tests of this file: they take longest to come up."""
    pytest.importorskip("ray")
    with cluster() as made:
        made.head()
        made.node(hidden=folder / HIDDEN if os.getuid() == 0 else None)
        yield made


@pytest.fixture(scope="module")
def expected(folder: Path, server: AbstractServer) -> dict[str, object]:
    """What one process measures."""
    assert measure_plans(task(folder, server.url(), "one"), plans(folder)) == PLANS
    return values(folder, server.url(), "one")


def test_two_commands_at_once_share_the_plans(
    folder: Path, server: AbstractServer, expected: dict[str, object]
) -> None:
    both = [Command(folder, server.url(), "two", executor="local") for _ in "ab"]

    ends = [run.end() for run in both]

    counts = [int(out.rpartition("measured ")[2]) for _, out, _ in ends]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum(counts) == PLANS
    assert stored(folder, server.url(), "two") == ONCE
    assert values(folder, server.url(), "two") == expected


def test_a_killed_command_leaves_its_claim_to_the_next_one(
    folder: Path, server: AbstractServer, expected: dict[str, object]
) -> None:
    killed = Command(folder, server.url(), "next", executor="local")
    killed.wait_for(2)
    killed.process.kill()
    killed.end()
    before = stored(folder, server.url(), "next").total()

    done = measure_plans(task(folder, server.url(), "next"), plans(folder))

    assert 2 <= before < PLANS
    assert done == PLANS - before
    assert stored(folder, server.url(), "next") == ONCE
    assert values(folder, server.url(), "next") == expected


def test_a_database_that_stops_for_twenty_seconds_is_waited_for(
    folder: Path, server: AbstractServer, expected: dict[str, object]
) -> None:
    run = Command(folder, server.url(), "stopped", executor="pool", workers=2)
    run.wait_for(3)
    server.stop()
    time.sleep(20)
    assert run.process.poll() is None
    server.start()

    code, out, error = run.end()

    assert (code, f"measured {PLANS}" in out) == (0, True), (out, error)
    assert stored(folder, server.url(), "stopped") == ONCE
    assert values(folder, server.url(), "stopped") == expected


def test_a_worker_without_the_models_files_is_left_out_with_a_word(
    folder: Path, server: AbstractServer, ray: Cluster, expected: dict[str, object]
) -> None:
    if os.getuid() != 0:
        pytest.skip("a folder is hidden from a node by root alone")
    options = {"executor": "ray", "workers": 2, "address": ray.address}

    code, out, error = Command(folder, server.url(), "files", pipe=HIDDEN, **options).end()

    assert code == 0, (out, error)
    assert out.count("said: a worker is left out:") == 1, out
    assert stored(folder, server.url(), "files") == ONCE
    assert values(folder, server.url(), "files") == expected


def test_a_killed_worker_is_started_again_and_its_plan_measured_once(
    folder: Path, server: AbstractServer, ray: Cluster, expected: dict[str, object]
) -> None:
    run = Command(folder, server.url(), "killed", executor="ray", workers=2, address=ray.address)
    run.wait_for(3)
    os.kill(ray.workers()[0], signal.SIGKILL)

    code, out, error = run.end()

    assert (code, f"measured {PLANS}" in out) == (0, True), (out, error)
    assert stored(folder, server.url(), "killed") == ONCE
    assert values(folder, server.url(), "killed") == expected


def test_a_killed_head_ends_the_command_in_words_and_the_same_command_goes_on(
    folder: Path, server: AbstractServer, ray: Cluster, expected: dict[str, object]
) -> None:
    options = {"executor": "ray", "workers": 2, "address": ray.address}
    run = Command(folder, server.url(), "head", **options)
    run.wait_for(3)
    for node in [*ray.nodes]:
        ray.kill(node)

    code, out, error = run.end(180)

    assert code != 0
    assert "the same command goes on" in out, (out, error)
    some = stored(folder, server.url(), "head")
    assert 3 <= some.total() < PLANS
    ray.head(cores=2)  # it stays alone: this is the last test of the cluster
    code, out, error = Command(folder, server.url(), "head", **options).end()
    assert code == 0, (out, error)
    assert stored(folder, server.url(), "head") == ONCE
    assert values(folder, server.url(), "head") == expected
