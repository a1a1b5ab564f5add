"""Weight-only kernels against their twins: the interpreter here, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from qsearch_kernels import layout, reference, reference_levels
from qsearch_kernels.gpu.dequantize import dequantize
from qsearch_kernels.gpu.linear_wna16 import linear_wna16
from tests.kernels.grid import DEVICES, DTYPES, assert_near, run


def example(
    rows: int, columns: int, bits: int, group: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, packed; scale and zero."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    shape = (1 if group == -1 else rows, -(-columns // group) if group > 0 else 1)
    return (
        codes.to(device),
        layout.pack(codes, bits).to(device),
        (torch.rand(shape) + 0.1).to(device),
        (torch.rand(shape) * 2**bits).to(device),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(3, 10, 4), (5, 129, 0), (33, 40, 16), (4, 140, -1), (2, 150, 128)],
)
def test_a_packed_weight_comes_out_as_its_twin_says(
    device: str, bits: int, rows: int, columns: int, group: int
) -> None:
    codes, packed, scale, zero = example(rows, columns, bits, group, device)

    launches, made = dequantize(packed, scale, zero, 0.0, None, bits, columns, group, torch.float32)
    run(*launches)

    assert_near(made, reference.dequantize(codes, scale, zero, group))


@pytest.mark.parametrize("device", DEVICES)
def test_integers_of_8_bits_that_lie_as_signed_bytes_are_taken_as_they_are(device: str) -> None:
    codes, _, scale, zero = example(6, 50, 8, 16, device)
    signed, x = (codes ^ 128).view(torch.int8), torch.randn(3, 50, device=device)

    launches, made = dequantize(signed, scale, zero, 0.0, None, 8, 50, 16, torch.float32)
    run(*launches)
    assert_near(made, reference.dequantize(codes, scale, zero, 16))

    launches, made = linear_wna16(x, signed, scale, zero, 0.0, None, 8, 50, 16)
    run(*launches)
    assert_near(
        made, reference_levels.linear_levels(x, codes, scale, zero, 0.0, None, 8, 50, 16), 2
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_weight_is_rounded_once_to_the_type_that_is_asked_for(
    device: str, dtype: torch.dtype
) -> None:
    codes, packed, scale, _ = example(6, 50, 4, 16, device)

    launches, made = dequantize(packed, scale, None, 8.0, None, 4, 50, 16, dtype)
    run(*launches)

    assert_near(made, reference.dequantize(codes, scale, 8.0, 16).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [3, 5, 7])
def test_levels_for_the_int8_product_are_codes_less_their_offset(device: str, bits: int) -> None:
    codes, packed, _, _ = example(5, 37, bits, 0, device)

    launches, made = dequantize(
        packed, None, None, 2.0 ** (bits - 1), None, bits, 37, 0, torch.int8
    )
    run(*launches)

    torch.testing.assert_close(made, (codes.int() - 2 ** (bits - 1)).to(torch.int8), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tables", [(8,), (1, 8), (6, 8), (6, 3, 8)], ids=str)
def test_codebooks_are_looked_up_for_all_rows_for_each_row_or_for_each_group(
    device: str, tables: tuple[int, ...]
) -> None:
    _, packed, scale, _ = example(6, 40, 3, 16, device)
    table = torch.randn(tables, device=device)

    launches, made = dequantize(packed, scale, None, 0.0, table, 3, 40, 16, torch.float32)
    run(*launches)

    assert_near(
        made,
        reference_levels.dequantize_levels(
            packed, scale, None, 0.0, table, 3, 40, 16, torch.float32
        ),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "bits", "group", "columns"),
    [
        (1, 4, 0, 70),
        (16, 4, 32, 130),
        (5, 3, 64, 130),
        (2, 2, 16, 50),
        (1, 8, 0, 33),
        (3, 5, 128, 260),
        (1, 4, -1, 40),
    ],
)
def test_a_few_rows_are_multiplied_with_packed_weights(
    device: str, dtype: torch.dtype, rows: int, bits: int, group: int, columns: int
) -> None:
    _, packed, scale, zero = example(37, columns, bits, group, device)
    x, bias = (
        torch.randn(rows, columns, device=device).to(dtype),
        torch.randn(37, device=device).to(dtype),
    )

    launches, made = linear_wna16(x, packed, scale, zero, 0.0, None, bits, columns, group, bias)
    run(*launches)

    assert_near(
        made,
        reference_levels.linear_levels(
            x, packed, scale, zero, 0.0, None, bits, columns, group, bias
        ),
        2,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [True, False])
def test_a_few_rows_are_multiplied_with_codebooks(device: str, shared: bool) -> None:
    codes, packed, _, _ = example(9, 45, 4, 0, device)
    table = torch.randn(1 if shared else 9, 16, device=device)
    x, one = torch.randn(2, 1, 45, device=device), torch.ones(9, 1, device=device)

    launches, made = linear_wna16(x, packed, one, None, 0.0, table, 4, 45, 0)
    run(*launches)

    assert_near(made, x @ table.expand(9, -1).gather(1, codes.long()).T)


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_launches_nothing_and_strides_do_not_matter(device: str) -> None:
    _, packed, scale, zero = example(9, 40, 4, 0, device)
    x = torch.randn(40, 3, device=device).t()

    assert linear_wna16(x[:0], packed, scale, zero, 0.0, None, 4, 40, 0)[0] == ()
    launches, made = linear_wna16(x, packed, scale, zero, 0.0, None, 4, 40, 0)
    run(*launches)
    assert_near(
        made, reference_levels.linear_levels(x, packed, scale, zero, 0.0, None, 4, 40, 0), 2
    )


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_kernel_does_is_refused(device: str) -> None:
    _, packed, scale, zero = example(9, 40, 4, 0, device)

    with pytest.raises(ValueError, match="given 17 rows in groups of 0: dequantize instead"):
        linear_wna16(torch.randn(17, 40, device=device), packed, scale, zero, 0.0, None, 4, 40, 0)
    with pytest.raises(ValueError, match="given 1 rows in groups of 24: dequantize instead"):
        linear_wna16(torch.randn(1, 40, device=device), packed, scale, zero, 0.0, None, 4, 40, 24)
    with pytest.raises(ValueError, match=r"need a scale of shape \(9, 3\)"):
        linear_wna16(torch.randn(1, 40, device=device), packed, scale, zero, 0.0, None, 4, 40, 16)
    with pytest.raises(ValueError, match=r"packed in uint8 \[rows, 15\]"):
        dequantize(packed, scale, zero, 0.0, None, 3, 40, 0, torch.float32)
    with pytest.raises(ValueError, match=r"need levels \[16\]"):
        dequantize(
            packed, scale, zero, 0.0, torch.ones(1, 8, device=device), 4, 40, 0, torch.float32
        )
