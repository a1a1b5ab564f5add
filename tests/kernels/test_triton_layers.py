"""Layers put together of the kernels themselves, from an input in floating point to its output: the
reference's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qsearch_kernels import gpu_ops, ops, reference
from qsearch_kernels.weight import Weight

from .grid import DEVICES, INTERPRETED
from .test_cpu import arguments, make

#: largest error, of the largest output: bf16's own rounding (the interpreter truncates), and of
#: fp32 a code that falls on the other side of a half
NEAR = {torch.bfloat16: 2**-6, torch.float32: 2**-7}
PLACES = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run: in the interpreter they take the places of their twins, which are what
    a CPU has registered.
    """
    if INTERPRETED:
        for name in ("quantize_rows", "linear_a8", "linear_packed_a8", "conv2d_a8", "dequantize"):
            module = "quantize" if name == "quantize_rows" else name
            monkeypatch.setattr(gpu_ops, name, _as_in_its_schema(gpu_ops._kernel(module, name)))
    return str(request.param)


def _as_in_its_schema(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher hands defaults and names over in their order; a kernel takes them as they
    come.
    """
    order = {
        "form": 1,
        "activation": 2,
        "shift": 3,
        "divisor": 4,
        "scale": 5,
        "zero": 6,
        "group": 7,
    }

    def call(*given: Any, **named: Any) -> Any:
        if not named:
            return kernel(*given)
        whole = [*given, *("8", "", None, None, None, None, 0)[len(given) - 1 :]]
        for name, value in named.items():
            whole[order[name]] = value
        return kernel(*whole)

    return call


def on(device: str, w: Weight) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in w]


def near(made: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert made.dtype == dtype
    torch.testing.assert_close(
        made.float().cpu(),
        expected.float(),
        rtol=0,
        atol=NEAR[dtype] * float(expected.abs().max()),
        equal_nan=True,
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", NEAR)
def test_a_convolution(device: str, dtype: torch.dtype, bits: int, static: bool) -> None:
    w, x, bias = make(5, 6 * 9, bits), (torch.randn(2, 6, 5, 7) + 1).to(dtype), torch.randn(5)
    ends = (
        {"low": torch.tensor([-1.5]), "high": torch.tensor([2.5])}
        if static
        else {"low": None, "high": None}
    )
    expected = reference.conv2d_wnaxi(
        x.float(), **arguments(w), activation=8, bias=bias, **ends, **PLACES
    )  # type: ignore[arg-type]
    grids = [None if end is None else end.to(device) for end in ends.values()]

    made = ops._gpu_conv2d_rounded(
        x.to(device), *on(device, w), bias.to(device), 8, *PLACES.values(), *grids
    )

    near(made, expected, dtype)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_picture_that_is_not_finite(device: str, bad: float) -> None:
    w, x = make(5, 6 * 9, 8), torch.randn(2, 6, 5, 7)
    x[1, 3, 2, 2] = bad

    made = ops._gpu_conv2d_rounded(
        x.to(device), *on(device, w), None, 8, *PLACES.values(), None, None
    ).cpu()

    assert made[1].isnan().all()
    assert made[0].isfinite().all()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 32)])
@pytest.mark.parametrize("dtype", NEAR)
def test_a_linear_layer(
    device: str, dtype: torch.dtype, bits: int, group: int, static: bool
) -> None:
    w, x, bias = (
        make(6, 64, bits, zero=True, group=group),
        torch.randn(5, 64).to(dtype),
        torch.randn(6),
    )
    ends = (
        {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])}
        if static
        else {"low": None, "high": None}
    )
    expected = reference.linear_wnaxi(x.float(), **arguments(w), activation=8, bias=bias, **ends)  # type: ignore[arg-type]
    grids = [None if end is None else end.to(device) for end in ends.values()]

    made = ops._gpu_linear_rounded(x.to(device), *on(device, w), bias.to(device), 8, *grids)

    near(made, expected, dtype)
