"""The grid that every kernel is held against its twin on: shapes that divide nothing, small enough
for the interpreter, and where to run them.
"""

from __future__ import annotations

import os

import pytest
import torch

from qsearch_kernels.gpu.launching import Launch
from qsearch_kernels.gpu.tiles import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: the interpreter where it runs (test_interpreter.py starts it, in a process of its own), else a
#: GPU
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TINY = Tile(16, 32, 32, 4, 2, 1.0)
#: relative size of one rounding to a type (the interpreter truncates to bf16), and of sums in
#: another order
ROUNDING = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def run(*launches: Launch) -> None:
    """Carry out launches, one after the other;."""
    for launch in launches:
        launch.run()


def assert_near(made: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """`made` is `expected` up to one rounding to its type, of the largest entry where entries
    cancel.
    """
    assert made.dtype == expected.dtype
    rounding = factor * ROUNDING[made.dtype]
    largest = float(expected.float().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        made.float().cpu(),
        expected.float().cpu(),
        rtol=rounding,
        atol=rounding * largest * 0.25,
        equal_nan=True,
    )
