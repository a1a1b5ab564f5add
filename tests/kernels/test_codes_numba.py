"""Codes that become numbers in registers, in vectors of 8 and of 16 numbers: the products are those
of the dequantized weight, wherever rows, groups and pieces end."""

from __future__ import annotations

import pytest
import torch

from qsearch_kernels import dequantize_gemm, jit
from qsearch_kernels.weight import Weight

from .test_cpu import make

pytestmark = pytest.mark.skipif(jit.compiled("codes_numba") is None, reason="numba not installed")
LANES = (8, 16)


def check(x: torch.Tensor, weight: Weight, lanes: int, bias: torch.Tensor | None = None) -> None:
    assert dequantize_gemm.in_vectors(weight, lanes)
    wide = weight.dequantize(torch.float64)
    right = x.double() @ wide.T + (0 if bias is None else bias.double())

    made = dequantize_gemm.product_in_registers(x, weight, bias, lanes)

    assert made.dtype == x.dtype
    exact = 3e-6 if x.dtype == torch.float32 else 2.0**-8
    size = 4 + float((x.double().abs() @ wide.abs().T).max())
    torch.testing.assert_close(made.double(), right, rtol=0, atol=exact * size)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [0, 128, 640, 4096])
def test_products_are_those_of_the_dequantized_weight(
    bits: int, zero: bool, group: int, lanes: int
) -> None:
    for outputs, columns in ((1, 128), (33, 643), (300, 1289)):
        weight = make(outputs, columns, bits, zero=zero, group=group)
        for rows in (1, 2, 5, 8, 13, 24):
            check(torch.randn(rows, columns), weight, lanes)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_every_type_a_bias_and_groups_of_a_vector(
    bits: int, lanes: int, dtype: torch.dtype, rows: int, threads: int
) -> None:
    x, bias = torch.randn(rows, 4100).to(dtype), torch.randn(90)
    check(x, make(90, 4100, bits, zero=True), lanes, bias)
    group = {2: 4, 3: 8, 4: 2, 8: 1}[bits] * lanes
    check(x, make(90, 4100, bits, group=group), lanes, bias)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_at_the_ends_of_their_range(bits: int, lanes: int) -> None:
    for code in (0, 255):  # of packed bytes: the least and the greatest codes
        weight = make(20, 400, bits, zero=True)
        byte = code ^ 128 if bits == 8 else code
        codes = torch.full(weight.codes.shape, byte, dtype=torch.uint8).view(weight.codes.dtype)
        weight = weight._replace(codes=codes)
        for rows in (1, 4, 16):
            check(torch.full((rows, 400), 3.0), weight, lanes)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_where_a_row_is_too_short_or_groups_are_no_whole_vectors_it_is_not_offered(
    bits: int, lanes: int
) -> None:
    phases = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}[bits]
    least = phases * (lanes - 1) + 1

    check(torch.randn(5, least), make(3, least, bits), lanes)
    check(torch.randn(5, least), make(3, least, bits, group=2 * least), lanes)
    assert not dequantize_gemm.in_vectors(make(3, least - 1, bits), lanes)
    for group in (8, 24):
        whole = group % (phases * lanes) == 0
        assert dequantize_gemm.in_vectors(make(3, 400, bits, group=group), lanes) == whole
    if bits == 4:
        books = make(3, 400, bits)._replace(levels=torch.randn(16))
        assert not dequantize_gemm.in_vectors(books, lanes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("lanes", LANES)
def test_a_row_that_is_not_finite_does_not_become_a_number(
    lanes: int, rows: int, bad: float
) -> None:
    x = torch.randn(rows, 300)
    x[-1, 290] = bad
    for weight in (make(20, 300, 4, zero=True), make(20, 300, 4, group=32)):
        made = dequantize_gemm.product_in_registers(x, weight, None, lanes)
        assert not made[-1].isfinite().any()
        assert made[:-1].isfinite().all()


@pytest.mark.parametrize(("cap", "known"), [("AVX2", False), ("avx2_vnni_2", False), ("", True)])
def test_vectors_of_16_are_not_offered_where_avx512_is_capped(
    cap: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jit.has_avx512()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    jit.has_avx512.cache_clear()
    try:
        assert jit.has_avx512() == (known and before)
        for rows in (1, 16, 300):
            lanes = dequantize_gemm._lanes(make(20, 400, 4, group=32), rows)
            assert lanes == (16 if known and before else 8 if rows <= 48 and jit.has_avx2() else 0)
    finally:
        jit.has_avx512.cache_clear()
