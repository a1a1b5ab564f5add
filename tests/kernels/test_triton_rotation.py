"""Triton's rotation of rows against its twin: the interpreter here, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from qsearch_kernels import hadamard
from qsearch_kernels.gpu.rotate import rotate, rotate_quantize_rows
from tests.kernels.grid import DEVICES, DTYPES, assert_near, run
from tests.kernels.test_triton_rows import assert_same_rows

SHAPES = [
    ((3, 48), 16), ((2, 3, 64), 64), ((1, 320), 64), ((2, 768), 256), ((5, 16), 16),
    ((2, 1152), 64),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "group"), SHAPES, ids=str)
def test_rows_are_rotated_as_the_matrix_rotates_them(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], group: int
) -> None:
    x = torch.randn(shape, device=device).to(dtype)

    launches, made = rotate(x, group)
    run(*launches)

    assert_near(made, hadamard.rotate_slow(x, group), 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["8", "4", "e4m3"])
@pytest.mark.parametrize("activation", ["", "gelu-tanh", "geglu"])
def test_rows_are_rotated_and_rounded_in_one_pass(device: str, form: str, activation: str) -> None:
    x = torch.randn(3, 192 * (2 if activation == "geglu" else 1), device=device) * 2 + 0.3
    divisor = torch.rand(192, device=device) + 0.5

    launches, made = rotate_quantize_rows(x, 64, form, activation, divisor, group=32)
    run(*launches)

    expected = hadamard.rotate_quantize_rows(x, 64, form, activation, divisor, group=32)
    if form == "e4m3":
        torch.testing.assert_close(made.scale, expected.scale, rtol=2**-10, atol=0)
    else:
        assert_same_rows(made, expected, computed=True)


@pytest.mark.parametrize("device", DEVICES)
def test_groups_that_do_not_divide_the_channels_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="given groups of 64 of 100 channels"):
        rotate(torch.randn(2, 100, device=device), 64)
    assert rotate(torch.randn(0, 64, device=device), 64)[0] == ()
