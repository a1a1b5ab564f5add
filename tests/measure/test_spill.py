"""Recorded calls whose tensors are many lie on disk, and are the same calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsearch.core.errors import QSearchError
from qsearch.measure import recording, spill
from qsearch.measure.pipelines import Prompts, Sampling, model_of, record, run
from qsearch.measure.spill import Spill
from tests.tiny_pipelines import build

PROMPTS = Prompts(("a red circle", "two blue squares"))
SAMPLING = Sampling(steps=2, guidance=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(300, 400), (3, 1, 40000), (70000,)])
def test_a_tensor_on_disk_is_the_same_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    tensor = (torch.randn(shape) * 3).to(dtype).transpose(0, -1)
    kept = Spill(limit=0)

    copy = kept.copy(tensor)

    assert torch.equal(copy, tensor)
    assert copy.dtype == dtype
    assert copy.data_ptr() != tensor.data_ptr()
    if tensor.numel() * tensor.element_size() >= 2**16:
        assert (kept.kept, kept.mapped) == (0, tensor.numel() * tensor.element_size())
    copy.zero_()
    assert tensor.any()


def test_calls_on_disk_are_run_as_those_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Spill] = []

    def full() -> Spill:
        made.append(Spill(limit=0))
        return made[-1]

    pipe = build("stable_diffusion_3")
    plain = record(pipe, PROMPTS, SAMPLING, 1)
    monkeypatch.setattr(spill, "_SMALL", 0)
    monkeypatch.setattr(recording, "Spill", full)
    on_disk = record(pipe, PROMPTS, SAMPLING, 1)

    assert made[-1].mapped > 0
    model = model_of(pipe)
    for one, other in zip(plain, on_disk, strict=True):
        assert torch.equal(run(model, one), run(model, other))


def test_a_disk_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)

    with pytest.raises(QSearchError, match="set TMPDIR to a folder with room"):
        Spill(limit=0).copy(torch.zeros(2**16))
