"""The reference operations against the definition, written out code by code, on ragged shapes."""

from __future__ import annotations

import math

import pytest
import torch

from qsearch_kernels import layout, reference

CASES = [  # rows, columns, bits, group
    (1, 1, 1, 0),
    (3, 10, 4, 4),
    (5, 13, 3, 5),
    (4, 7, 8, 64),
    (6, 33, 5, 32),
    (2, 9, 2, 0),
    (7, 11, 6, -1),
    (3, 129, 7, 1),
]


def scale_shape(rows: int, columns: int, group: int) -> tuple[int, int]:
    return (1 if group == -1 else rows, math.ceil(columns / group) if group > 0 else 1)


def example(
    rows: int, columns: int, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero, in float64 so that what is compared is the arithmetic and not its
    rounding.
    """
    shape = scale_shape(rows, columns, group)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    return (
        codes,
        torch.rand(shape, dtype=torch.float64) + 0.1,
        torch.rand(shape, dtype=torch.float64) * 2**bits,
    )


def by_hand(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int
) -> torch.Tensor:
    """scale * (code - zero), one code at a time."""
    out = torch.empty(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            place = (0 if group == -1 else i, j // group if group > 0 else 0)
            out[i, j] = float(scale[place]) * (int(codes[i, j]) - float(zero[place]))
    return out


@pytest.mark.parametrize(("rows", "columns", "bits", "group"), CASES)
def test_a_weight_is_scale_times_code_less_zero(
    rows: int, columns: int, bits: int, group: int
) -> None:
    codes, scale, zero = example(rows, columns, bits, group)

    torch.testing.assert_close(
        reference.dequantize(codes, scale, zero, group),
        by_hand(codes, scale, zero, group),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("group", [0, 4, -1])
def test_one_number_for_all_zeros_is_the_symmetric_case(group: int) -> None:
    codes, scale, _ = example(5, 10, 4, group)

    expected = reference.dequantize(codes, scale, torch.full_like(scale, 8.0), group)
    torch.testing.assert_close(
        reference.dequantize(codes, scale, 8, group), expected, rtol=0, atol=0
    )


def test_the_weight_has_the_type_of_the_scale_and_is_rounded_once() -> None:
    codes, scale, zero = example(4, 12, 4, 3)
    half_scale, half_zero = scale.to(torch.float16), zero.to(torch.float16)

    weight = reference.dequantize(codes, half_scale, half_zero, 3)

    assert weight.dtype == torch.float16
    exact = by_hand(codes, half_scale.double(), half_zero.double(), 3)
    torch.testing.assert_close(
        weight.double(), exact, rtol=2**-11 * 1.01, atol=2**-24
    )  # half a unit in the last place of float16


@pytest.mark.parametrize(("rows", "columns", "bits", "group"), CASES)
@pytest.mark.parametrize("batch", [(), (1,), (3, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_is_a_product_with_the_dequantized_weight(
    rows: int, columns: int, bits: int, group: int, batch: tuple[int, ...], biased: bool
) -> None:
    codes, scale, zero = example(rows, columns, bits, group)
    x = torch.randn(*batch, columns, dtype=torch.float64)
    bias = torch.randn(rows, dtype=torch.float64) if biased else None

    out = reference.linear_wna16(
        x, layout.pack(codes, bits), scale, zero, bits=bits, columns=columns, group=group, bias=bias
    )

    weight = by_hand(codes, scale, zero, group)
    expected = torch.stack([(x * row).sum(-1) for row in weight], dim=-1) + (
        0 if bias is None else bias
    )
    assert out.shape == (*batch, rows)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_computes_in_float32_and_returns_the_type_of_its_input(dtype: torch.dtype) -> None:
    codes, scale, zero = example(8, 300, 4, 32)
    x, scale, zero = torch.randn(4, 300).to(dtype), scale.to(dtype), zero.to(dtype)

    out = reference.linear_wna16(
        x, layout.pack(codes, 4), scale, zero, bits=4, columns=300, group=32
    )

    exact = x.double() @ by_hand(codes, scale.double(), zero.double(), 32).T
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(),
        exact,
        rtol=1.01 * torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-5,
        atol=2e-3,
    )


@pytest.mark.parametrize(
    ("scale", "zero", "named"),
    [((5, 2), (5, 3), "scale"), ((5, 3), (5, 1), "zero"), ((1, 3), (5, 3), "scale")],
)
def test_scales_and_zeros_of_another_shape_are_refused_with_the_right_one(
    scale: tuple[int, int], zero: tuple[int, int], named: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"codes 5 x 10 in groups of 4 need a {named} of shape \(5, 3\); given"
    ):
        reference.dequantize(
            torch.zeros(5, 10, dtype=torch.uint8), torch.ones(scale), torch.ones(zero), 4
        )
