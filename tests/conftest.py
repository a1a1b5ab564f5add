"""What all tests share: fixed seeds, no network, a small graph, a place where nothing can be
written.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qsearch.cli import commands
from qsearch.core.graph import Block, LayerSpec, Op, OpGraph

#: `qsearch ARGUMENTS`: exit code, standard output, standard error
Command = Callable[..., tuple[int, str, str]]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network, nor wait for one


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers whatever ran before; torch is seeded where a test has imported it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """One small Ray on this machine for all tests of a file."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    small = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    ray.init("local", log_to_driver=False, logging_level="error", **small)
    yield
    ray.shutdown()


def make_graph(model: str = "tiny", width: int = 24) -> OpGraph:
    """Four layers in one block: an embedding that stays, two linear layers, a convolution with a
    ragged row. Golden files hold it: leave it as it is.
    """
    layers = (
        LayerSpec("embed", "text-embedding", "embedding", (10, width), 0, quantizable=False),
        LayerSpec(
            "blocks.0.to_q",
            "self-attention-q",
            "linear",
            (width, width),
            16 * width * width,
            "blocks.0",
            inputs=16 * width,
            outputs=16 * width,
        ),
        LayerSpec(
            "blocks.0.ff",
            "feed-forward-in",
            "linear",
            (40, width),
            16 * 40 * width,
            "blocks.0",
            bias=True,
        ),
        LayerSpec("out", "output", "conv2d", (4, 5, 3, 3), 64 * 180, calls=2),
    )
    ops = tuple(
        Op(layer.name, layer.kind, layer.name, layer.block, (1, 16, width)) for layer in layers
    )
    edges = tuple((a.name, b.name) for a, b in itertools.pairwise(layers))
    return OpGraph(
        model,
        layers,
        ops,
        edges,
        (Block("blocks.0", "self-attention", ("blocks.0.to_q", "blocks.0.ff"), 0),),
    )


@pytest.fixture
def graph() -> OpGraph:
    """`make_graph()`."""
    return make_graph()


@pytest.fixture
def other_graph() -> OpGraph:
    """A graph with the same layer names and other shapes."""
    return make_graph("wider", width=32)


@pytest.fixture
def blocked_folder(tmp_path: Path) -> Path:
    """A folder that can't be written, for root too: a file stands in its place."""
    (tmp_path / "blocked").write_text("a file, not a folder")
    return tmp_path / "blocked"


@pytest.fixture(scope="session")
def published() -> Path:
    """MixDQ's published measurements: beside the repository, or in `mixdq` of the folder that
    QSEARCH_REFERENCE names.
    """
    folder = (
        Path(
            os.environ.get("QSEARCH_REFERENCE", Path(__file__).parents[2] / "shared" / "reference")
        )
        / "mixdq"
    )
    if not folder.is_dir():
        pytest.skip(f"the published measurements are not here: {folder}; set QSEARCH_REFERENCE")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`qsearch ARGUMENTS` in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qsearch", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            commands.main()
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call
