"""What tests of metrics share: a CLIP of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.measure.metric_networks import save_clip


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CLIP of random weights, named in the environment."""
    save_clip(tmp_path)
    monkeypatch.setenv("QSEARCH_CLIP", str(tmp_path))
    return tmp_path
