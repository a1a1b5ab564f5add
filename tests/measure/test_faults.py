"""What dies in the middle of a campaign loses nothing and makes nothing twice: PostgreSQL, Ray on
two nodes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsearch.core.trials import Trials
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Sampling, example_inputs, record, scene_prompts
from tests import postgres
from tests.measure.campaigns import Command, stored
from tests.models import tiny_pipeline
from tests.ray_cluster import Cluster, cluster

PLANS = 14
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
ONCE = {f"random-0-{i:03d}": 1 for i in range(PLANS)}


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    if postgres.binaries() is None:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql`")
    pytest.importorskip("psycopg")
    with postgres.server() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with its graph."""
    made, pipe = tmp_path_factory.mktemp("campaign"), tiny_pipeline()
    pipe.save_pretrained(made / "pipe")
    (call,) = record(pipe, scene_prompts(1, 0), Sampling(steps=2, seed=3), 1)
    extract(pipe.unet, example_inputs(call, pipe.unet)).save(made / "graph.json")
    return made


@pytest.fixture
def ray() -> Iterator[Cluster]:
    """Two nodes of a core each."""
    pytest.importorskip("ray")
    with cluster() as made:
        made.head()
        made.node()
        made.cores(2)
        yield made


@pytest.fixture(scope="module")
def expected(folder: Path, server: postgres.Server) -> dict[str, object]:
    """What one worker in one process measures."""
    assert Command(folder, server.url(), PLANS, "one", executor="local").end()[0] == 0
    return values(folder, server, "one")


def values(folder: Path, server: postgres.Server, key: str) -> dict[str, object]:
    from qsearch.core.graph import OpGraph

    trials = Trials(server.url(), OpGraph.load(folder / "graph.json"))
    return {t.name: (t.metrics, t.samples) for t in trials.all() if t.setting == key}


def test_a_killed_worker_is_started_again_and_its_plan_measured_once(
    folder: Path, server: postgres.Server, ray: Cluster, expected: dict[str, object]
) -> None:
    run = Command(
        folder, server.url(), PLANS, "killed", executor="ray", workers=2, address=ray.address
    )
    run.wait_for(3)
    os.kill(ray.workers()[0], signal.SIGKILL)

    code, out, error = run.end()

    assert (code, f"measured {PLANS}" in out) == (0, True), (out, error)
    assert stored(folder, server.url(), "killed") == ONCE
    assert values(folder, server, "killed") == expected


def test_a_killed_head_ends_the_command_in_words_and_the_same_command_goes_on(
    folder: Path, server: postgres.Server, ray: Cluster, expected: dict[str, object]
) -> None:
    options = {"executor": "ray", "workers": 2, "address": ray.address}
    run = Command(folder, server.url(), PLANS, "head", **options)
    run.wait_for(3)
    for node in [*ray.nodes]:
        ray.kill(node)

    code, out, error = run.end(180)

    assert code != 0
    assert "the same command goes on" in out, (out, error)
    some = stored(folder, server.url(), "head")
    assert 3 <= len(some) < PLANS
    ray.head()
    ray.node()
    ray.cores(2)
    code, out, error = Command(folder, server.url(), PLANS, "head", **options).end()
    assert code == 0, (out, error)
    assert stored(folder, server.url(), "head") == ONCE
    assert values(folder, server, "head") == expected


def test_a_database_that_stops_for_twenty_seconds_is_waited_for(
    folder: Path, server: postgres.Server, expected: dict[str, object]
) -> None:
    run = Command(folder, server.url(), PLANS, "stopped", executor="pool", workers=2)
    run.wait_for(3)
    server.stop()
    time.sleep(20)
    assert run.process.poll() is None
    server.start()

    code, out, error = run.end()

    assert (code, f"measured {PLANS}" in out) == (0, True), (out, error)
    assert stored(folder, server.url(), "stopped") == ONCE
    assert values(folder, server, "stopped") == expected


def test_a_worker_without_the_models_files_is_left_out_with_a_word(
    folder: Path, server: postgres.Server, expected: dict[str, object]
) -> None:
    pytest.importorskip("ray")
    if os.getuid() != 0:
        pytest.skip("a folder is hidden from a node by root alone")
    with cluster() as made:
        made.head()
        made.node(hidden=folder / "pipe")
        made.cores(2)
        options = {"executor": "ray", "workers": 2, "address": made.address}

        code, out, error = Command(folder, server.url(), PLANS, "files", **options).end()

    assert code == 0, (out, error)
    assert out.count("said: a worker is left out:") == 1
    assert stored(folder, server.url(), "files") == ONCE
    assert values(folder, server, "files") == expected


def test_two_commands_at_once_share_the_plans(
    folder: Path, server: postgres.Server, expected: dict[str, object]
) -> None:
    both = [Command(folder, server.url(), PLANS, "two", executor="pool", workers=1) for _ in "ab"]

    ends = [run.end() for run in both]

    counts = [int(out.rpartition("measured ")[2]) for _, out, _ in ends]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum(counts) == PLANS
    assert stored(folder, server.url(), "two") == ONCE
    assert values(folder, server, "two") == expected


def test_a_killed_command_leaves_its_claim_to_the_next_one(
    folder: Path, server: postgres.Server, expected: dict[str, object]
) -> None:
    first = Command(folder, server.url(), PLANS, "next", executor="local")
    first.wait_for(2)
    first.process.kill()
    first.end()

    code, out, error = Command(folder, server.url(), PLANS, "next", executor="local").end()

    assert code == 0, (out, error)
    assert stored(folder, server.url(), "next") == ONCE
    assert values(folder, server, "next") == expected


def test_a_wrong_password_is_one_line_without_it(folder: Path, server: postgres.Server) -> None:
    url = server.url("wr0ng%40word")

    code, out, error = Command(folder, url, PLANS, "password", executor="local").end()

    assert code == 2
    assert "can't be opened" in out
    for text in (out, error):
        assert "wr0ng" not in text
