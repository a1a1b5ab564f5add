"""Tasks for tests of executors, in a module that worker processes can import."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from qsearch.core.errors import QSearchError
from qsearch.measure.executing import Do


def squares(folder: str, device: str) -> Do:
    """Notes in `folder` that a worker began; then the square of a number, threads and process."""
    (Path(folder) / f"began-{os.getpid()}-{time.monotonic_ns()}").touch()

    def do(part: int) -> tuple[int, int, int]:
        if part < 0:
            raise QSearchError(f"a part is not below zero; given {part}")
        return part * part, torch.get_num_threads(), os.getpid()

    return do


def refusing(device: str) -> Do:
    """A worker that can't begin."""
    raise QSearchError("nothing/here holds no pipeline")


def dying(folder: str, device: str) -> Do:
    """A worker that is killed in the middle of part 2, the first time that anybody is at it."""

    def do(part: int) -> int:
        mark = Path(folder) / "died"
        if part == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        return part * part

    return do


def sums(part: Any) -> float:
    """A sum that another number of threads would round differently."""
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(int(part)))
    return float(numbers.exp().sum())


def summing(device: str) -> Do:
    """A worker that gives sums."""
    return sums
