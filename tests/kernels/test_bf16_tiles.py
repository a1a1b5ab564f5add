"""bf16 rows times packed weights in tiles with `vdpbf16ps`: exact where nothing is rounded, near
the reference elsewhere, on shapes that divide nothing, in one thread and in several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsearch_kernels import bf16_tiles, cpu, jit, layout, products
from qsearch_kernels.weight import Weight

from .made_up_cores import table
from .test_cpu import check_linear, make

needs_bf16 = pytest.mark.skipif(not jit.has_bf16(), reason="no AVX512-BF16, or capped")
#: rows, inputs, outputs; of many inputs only so many rows are multiplied at once
SHAPES = ((1, 1, 1), (4, 31, 65), (5, 131, 33), (17, 64, 32), (70, 261, 19), (30, 2500, 40))
LONG = (250, 8193, 35)


@needs_bf16
@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_numbers_are_multiplied_exactly(bits: int, threads: int) -> None:
    most = 2**bits - 1
    for rows, columns, outputs in SHAPES:
        drawn = torch.randint(0, most + 1, (outputs, columns))
        for codes in (drawn, torch.full_like(drawn, most), torch.zeros_like(drawn)):
            packed = layout.pack(codes, bits)
            packed = layout.signed(packed) if bits == 8 else packed
            for zero in (0.0, 2.0 ** (bits - 1), float(most)):
                weight = Weight(packed, torch.ones(1, 1), None, zero, None, bits, columns, -1)
                x = torch.randint(-26, 27, (rows, columns))

                made = bf16_tiles.product(x.bfloat16(), weight, None)

                assert torch.equal(made, (x @ (codes - int(zero)).T).bfloat16())


@needs_bf16
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [True, False])
def test_codes_are_exact_without_groups_and_numbers_are_rounded_with_them(
    bits: int, zero: bool, threads: int
) -> None:
    for rows, columns, outputs in SHAPES:
        for group in (0, 32, 64):
            weight = make(outputs, columns, bits, zero=zero, group=group)
            if not bf16_tiles.takes(weight):
                assert 0 < group < 4 * layout.phases(bits)
                continue
            x, bias = torch.randn(rows, columns).bfloat16(), torch.randn(outputs)
            values = weight.dequantize(torch.float64)
            right = x.double() @ values.T + bias
            size = x.double().abs() @ (values.abs() + 2**bits * weight.scale.double().amax()).T

            made = bf16_tiles.product(x, weight, bias)

            assert made.dtype == torch.bfloat16
            rounding = (2.0**-8 if group else 2e-6) * size + 2.0**-8 * right.abs() + 1e-6
            assert ((made.double() - right).abs() <= rounding).all()


@needs_bf16
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 64), (3, 0)])
def test_many_columns_are_summed_in_pieces_and_few_rows_at_a_time(
    bits: int, group: int, threads: int
) -> None:
    rows, columns, outputs = LONG
    weight = make(outputs, columns, bits, zero=True, group=group)
    x = torch.randn(columns, rows).bfloat16().T
    right = x.double() @ weight.dequantize(torch.float64).T

    made = bf16_tiles.product(x, weight, None)

    slack = (1e-2 if group else 1e-4) * float(right.std())
    torch.testing.assert_close(made.double(), right, rtol=2.0**-8, atol=slack)


@needs_bf16
@pytest.mark.parametrize("zero", [-300.25, -1.0, 0.5, 255.0, 1000.0])
@pytest.mark.parametrize("group", [0, 64])
def test_a_zero_may_lie_anywhere(zero: float, group: int) -> None:
    weight = make(33, 128, 8, zero=True, group=group)
    assert weight.zero is not None
    weight = weight._replace(zero=torch.full_like(weight.zero, zero))
    x = torch.randn(20, 128).bfloat16()
    values = weight.dequantize(torch.float64)

    made = bf16_tiles.product(x, weight, None)

    size = x.double().abs() @ values.abs().T
    rounding = 2.0**-8 * (x.double() @ values.T).abs() + (2.0**-8 if group else 1e-5) * size
    assert ((made.double() - x.double() @ values.T).abs() <= rounding).all()


@needs_bf16
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("zero", [True, False])
def test_a_row_that_is_not_finite_is_the_only_one(bad: float, zero: bool, threads: int) -> None:
    for group in (0, 32):
        weight, x = make(70, 96, 4, zero=zero, group=group), torch.randn(21, 96).bfloat16()
        x[20, 95] = bad

        made = bf16_tiles.product(x, weight, None)

        assert made[:20].isfinite().all()
        assert not made[20].isfinite().any()


@needs_bf16
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (3, 0), (4, 64)])
def test_it_is_taken_for_bf16_rows_where_it_is_the_fastest(bits: int, group: int) -> None:
    weight, bias = make(40, 128, bits, zero=True, group=group), torch.randn(40)
    kind = products.kind_of(weight, None).replace(" ", "_")

    with products.using(table(**{f"{kind}_bf16": "bf16 tiles"})):
        for rows in (1, 16, 200):
            assert cpu.weight_way(weight, rows, torch.bfloat16) == "bf16 tiles"
            assert "bf16 tiles" not in cpu.weight_ways(weight, rows, torch.float16)
            assert "bf16 tiles" not in cpu.weight_ways(weight, rows, torch.float32)
            check_linear(torch.randn(rows, 128).bfloat16(), weight, bias)


def test_tables_of_levels_and_groups_within_a_word_are_left_to_others() -> None:
    assert not bf16_tiles.takes(make(8, 64, 4, levels=torch.randn(16)))
    assert not bf16_tiles.takes(make(8, 64, 3, group=16))


@pytest.mark.parametrize("cap", ["AVX2", "avx512_core_vnni"])
def test_it_is_not_offered_where_bf16_is_capped(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    jit.has_bf16.cache_clear()
    try:
        assert not jit.has_bf16()
        assert "bf16 tiles" not in cpu.weight_ways(make(8, 64, 4), 40, torch.bfloat16)
    finally:
        jit.has_bf16.cache_clear()


def test_it_is_not_offered_where_the_compiler_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = pytest.importorskip("numba.core.config")
    monkeypatch.setattr(config, "CPU_NAME", "cascadelake")
    monkeypatch.setattr(config, "CPU_FEATURES", "+avx2,+avx512bw,+avx512vnni")
    jit.has_bf16.cache_clear()
    try:
        assert not jit.has_bf16()
    finally:
        jit.has_bf16.cache_clear()
