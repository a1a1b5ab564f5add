"""The tiny pipeline of the grid, built once."""

from __future__ import annotations

import pytest

from .world import World, build


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pipeline of random weights with its graph and calls."""
    return build(tmp_path_factory.mktemp("grid") / "pipeline")
