"""What tests of files for other tools share: the small model of `tool_files`, and its pipeline on
disk.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qsearch.core.graph import OpGraph
from tests.execute.tool_files import small_graph, small_source, small_weights


@pytest.fixture
def graph() -> OpGraph:
    """`small_graph()`."""
    return small_graph()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """`small_weights()`."""
    return small_weights()


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Their pipeline on disk."""
    return small_source(tmp_path, weights)
