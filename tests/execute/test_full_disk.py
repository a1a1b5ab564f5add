"""A disk that fills while a file is written: one line with the path, the old file as it was, and
nothing else left. The system refuses in truth, by a limit of a file's size.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.execute import packed_file
from qsearch.execute.exports import export
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from tests.models import dit_inputs, tiny_dit

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, OpGraph, Plan, Path]:
    """A packed model, its graph and plan, and the folder of the plain one."""
    torch.manual_seed(0)
    model, folder = tiny_dit().eval(), tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder / "transformer")
    graph = extract(model, dit_inputs())
    plan = Plan.uniform(graph, "int8-c")
    return apply(model, plan, graph), graph, plan, folder


@pytest.mark.parametrize("tool", ["packed", "gguf", "sdnq", "comfyui", "compressed_tensors"])
@pytest.mark.parametrize("size", [0, 700, 5000], ids=["no room", "a little", "nearly enough"])
def test_every_writer_says_so_in_one_line_and_leaves_nothing(
    written: tuple[nn.Module, OpGraph, Plan, Path], tmp_path: Path, tool: str, size: int
) -> None:
    model, graph, plan, folder = written
    (tmp_path / "old").write_text("old")

    with pytest.raises(QSearchError) as caught, room_for(size):
        if tool == "packed":
            packed_file.save(model, tmp_path / "model.safetensors", graph, plan)
        else:
            export(plan, graph, folder, tool, tmp_path / tool, nearest=True)

    said = str(caught.value)
    assert said.startswith(f"cannot write {tmp_path}")
    assert "\n" not in said
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
