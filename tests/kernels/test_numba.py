"""What numba compiles for a CPU gives what plain torch gives: rows rounded and finished, codes in
the order of phases, widened weights, products of 16 bits; in one thread and in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qsearch_kernels import (
    cpu_rounded,
    cpu_rows,
    dequantize_gemm,
    digits,
    integer_sums,
    jit,
    layout,
    products,
)
from qsearch_kernels.weight import Weight

from .made_up_cores import table
from .test_cpu import make

pytestmark = pytest.mark.skipif(jit.compiled("rows_numba") is None, reason="numba not installed")
MODULES = (cpu_rounded, cpu_rows, dequantize_gemm, integer_sums, layout)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Calls something where numba is not installed."""

    def call(work: Callable[[], Tensor]) -> Tensor:
        with monkeypatch.context() as patch:
            for module in MODULES:
                for name in {"compiled", "passes"} & {*vars(module)}:
                    patch.setattr(module, name, lambda name: None)
            return work()

    return call


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [8, 7, 4])
def test_rows_get_the_same_codes_scales_and_sums(
    unsigned: bool,
    given: bool,
    dtype: torch.dtype,
    activation: int,
    threads: int,
    plain: Callable[..., cpu_rows.Bytes],
) -> None:
    rows = torch.randn(700, 131)
    rows[0], rows[1], rows[2] = 0, rows[1].abs(), -rows[2].abs()
    rows[3, 5], rows[4, 130], rows[5, 0] = torch.nan, torch.inf, -torch.inf
    rows[6], rows[7, 3] = 1e-30, -torch.tensor(torch.nan)
    rows = rows.to(dtype)
    ends = (torch.tensor(-1.5), torch.tensor(2.0)) if given else (None, None)

    def rounded() -> cpu_rows.Bytes:
        return cpu_rows.rows_of(rows, activation, *ends, sums=True)

    with products.using(table(unsigned=unsigned)):
        made, right = rounded(), plain(rounded)

    finite = rows.float().isfinite().all(1)
    assert made.codes.dtype == right.codes.dtype
    assert made.sums is not None and right.sums is not None
    for each, twin in zip(made[:4], right[:4], strict=True):
        assert torch.equal(each[finite], twin[finite])
    assert torch.equal(made.scale.isnan(), right.scale.isnan())
    assert made.scale[~finite].isnan().all()
    assert made.largest == right.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sums", [torch.int32, torch.float32])
@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_sums_are_finished_alike(
    dtype: torch.dtype,
    sums: torch.dtype,
    uneven: bool,
    biased: bool,
    threads: int,
    plain: Callable[..., Tensor],
) -> None:
    given = torch.randint(-(10**5), 10**5, (300, 260)).to(sums)
    left, right = torch.randn(300, 1 + uneven), torch.randn(1 + uneven, 260)
    scale, a_scale = torch.rand(260), torch.rand(300, 1)
    bias = torch.randn(260) if biased else None

    def finished() -> Tensor:
        out = torch.zeros(300, 400, dtype=dtype)
        cpu_rounded._finish(given.clone(), left, right, scale, a_scale, bias, out, 70)
        return out

    made, twin = finished(), plain(finished)

    torch.testing.assert_close(made, twin, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-1)
    assert made[:, 70:330].any() and not made[:, :70].any() and not made[:, 330:].any()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 64, 131])
def test_codes_come_in_the_same_order(
    bits: int, columns: int, threads: int, plain: Callable[..., Tensor]
) -> None:
    packed = layout.pack(torch.randint(0, 2**bits, (900, columns)), bits)
    padded = -(-columns // layout.phases(bits)) * layout.phases(bits)

    def codes() -> Tensor:
        out = torch.empty(900, padded, dtype=torch.uint8)
        return layout.unpack_by_phase(packed, bits, columns, out)

    assert torch.equal(codes(), plain(codes))
    for dtype in (torch.float32, torch.uint8, torch.int8, torch.bfloat16):
        x = torch.randint(0, 100, (2, 300, columns)).to(dtype)
        made = layout.by_phase(x, bits)
        assert torch.equal(made, plain(lambda x=x: layout.by_phase(x, bits)))
        assert made.shape == (2, 300, padded)


def _weights() -> Iterator[tuple[str, Weight]]:
    for bits in range(1, 9):
        for zero in (False, True):
            for group in (0, 8, 32):
                yield f"{bits}-{zero}-{group}", make(70, 131, bits, zero=zero, group=group)
    codes = layout.pack(torch.randint(0, 16, (70, 131)), 4)
    scale = torch.rand(70, 1)
    yield "table", Weight(codes, scale, None, 0.0, torch.randn(16), 4, 131, 0)
    groups, books = torch.rand(70, 9), torch.randn(70, 9, 16)
    yield "codebooks", Weight(codes, groups, None, 0.0, books, 4, 131, 16)
    yield "codebook a row", Weight(codes, scale, None, 0.0, books[:, :1], 4, 131, 0)


@pytest.mark.parametrize(("name", "weight"), list(_weights()), ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 25, 40, 400])
def test_a_product_with_a_widened_weight_is_the_plain_one(
    name: str, weight: Weight, rows: int, plain: Callable[..., Tensor]
) -> None:
    x = torch.randn(rows, weight.columns)

    made = dequantize_gemm.product(x, weight)
    tiles = dequantize_gemm.compiled_product(x, weight, None)

    right = plain(lambda: dequantize_gemm.product(x, weight))
    size = float((x.abs() @ weight.dequantize(torch.float32).abs().T).max())
    torch.testing.assert_close(made, right, rtol=0, atol=3e-6 * size)
    torch.testing.assert_close(tiles, right, rtol=0, atol=3e-6 * size)


@pytest.mark.parametrize("rows", [3, 16, 30])
def test_sums_of_many_equal_products_lose_no_more_than_a_piece_of_them(rows: int) -> None:
    weight = make(20, 2**16, 7)
    weight = weight._replace(codes=torch.full_like(weight.codes, 255))
    x = torch.full((rows, 2**16), 3.0)

    made = dequantize_gemm.compiled_product(x, weight, None)

    right = x.double() @ weight.dequantize(torch.float64).T
    torch.testing.assert_close(made.double(), right, rtol=3e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_compiled_product_takes_every_type_and_a_bias(
    bits: int, rows: int, dtype: torch.dtype, threads: int
) -> None:
    x, bias = torch.randn(rows, 131).to(dtype), torch.randn(90)
    x[0, 5] = torch.nan
    for weight in (make(90, 131, bits, zero=True), make(90, 131, bits, group=32)):
        right = torch.addmm(bias.double(), x.double(), weight.dequantize(torch.float64).T)

        made = dequantize_gemm.compiled_product(x, weight, bias)

        assert made.dtype == dtype
        assert made[0].isnan().all()
        exact = 3e-6 if dtype == torch.float32 else 2.0**-8
        size = 4 + float(
            (x.nan_to_num().double().abs() @ weight.dequantize(torch.float64).abs().T).max()
        )
        torch.testing.assert_close(made[1:].double(), right[1:], rtol=0, atol=exact * size)


@pytest.mark.skipif(not jit.has_avx2(), reason="no AVX2, or capped")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 131, 8190])
def test_one_row_of_fp32_is_two_digits_of_12_bits(bits: int, columns: int, threads: int) -> None:
    weight, row = make(9, columns, bits, zero=True), torch.randn(1, columns)
    row[0, 0] = 4
    values = weight._replace(scale=torch.ones(9, 1)).dequantize(torch.float64)
    size = float((row.double().abs() @ values.abs().T).max()) + 2.0**bits

    made = dequantize_gemm.one_row(row, weight)

    torch.testing.assert_close(made, row.double() @ values.T, rtol=0, atol=1e-6 * size)
    ends = torch.full((1, columns), 4.0)
    made, right = dequantize_gemm.one_row(ends, weight), ends.double() @ values.T
    torch.testing.assert_close(made, right, rtol=0, atol=1e-6 * columns * 2.0 ** (bits + 2))
    for bad in (torch.nan, -torch.tensor(torch.nan), torch.inf, -torch.inf):
        row[0, -1] = bad
        assert dequantize_gemm.one_row(row, weight).isnan().all()


@pytest.mark.skipif(not jit.has_avx2(), reason="no AVX2, or capped")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 131, 65536])
def test_one_row_of_bytes_is_exact_with_packed_codes(bits: int, columns: int, threads: int) -> None:
    most = torch.full((9, columns), 2**bits - 1)
    for codes in (most, torch.randint(0, 2**bits, (9, columns))):
        packed = layout.pack(codes, bits)
        packed, numbers = (layout.signed(packed), codes - 128) if bits == 8 else (packed, codes)
        weight = Weight(packed, torch.ones(9, 1), None, 0.0, None, bits, columns, 0)
        for row in (torch.full((1, columns), 255, dtype=torch.uint8), most[:1].char() * 0 - 128):
            made = dequantize_gemm.one_row_of_integers(row, weight)

            assert torch.equal(made, row.double() @ numbers.double().T)


@pytest.mark.skipif(not jit.has_avx2(), reason="no AVX2, or capped")
@pytest.mark.parametrize(
    ("rows", "columns", "outputs"),
    [(1, 1, 1), (3, 17, 5), (5, 2049, 3), (130, 4100, 9), (9, 31, 300), (2, 65536, 3)],
)
def test_products_of_16_bits_are_exact_at_the_ends_of_the_range(
    rows: int, columns: int, outputs: int, threads: int
) -> None:
    for low, high in ((0, 255), (-128, 127)):
        form = torch.uint8 if low == 0 else torch.int8
        for codes in (
            torch.randint(low, high + 1, (rows, columns)).to(form),
            torch.full((rows, columns), high if low == 0 else low, dtype=form),
        ):
            for matrix in (
                torch.randint(-128, 128, (outputs, columns)).to(torch.int8),
                torch.full((outputs, columns), -128, dtype=torch.int8),
            ):
                made = integer_sums.madd(matrix, 0)(codes)
                assert torch.equal(made, (codes.long() @ matrix.long().T).float())


@pytest.mark.skipif(not jit.has_vnni(), reason="no AVX512-VNNI, or capped")
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_with_vpdpbusd_are_exact_at_the_ends_of_the_range(bits: int, threads: int) -> None:
    for rows, columns, outputs in ((1, 1, 1), (9, 31, 65), (70, 261, 19), (17, 4100, 40)):
        most = torch.full((outputs, columns), 2**bits - 1)
        for matrix in (torch.randint(0, 2**bits, (outputs, columns)), most, most * 0):
            stored = layout.pack(matrix, bits)
            stored = layout.signed(stored) if bits == 8 else stored
            numbers = matrix - 128 if bits == 8 else matrix
            for codes in (torch.randint(0, 256, (rows, columns)), torch.full((rows, columns), 255)):
                none, made = torch.empty(0), torch.empty(rows, outputs)
                each_row = (torch.zeros(rows), none, torch.ones(rows))
                zeros = torch.zeros(outputs)

                integer_sums.tiles_finished(
                    "vnni", codes.to(torch.uint8), stored, bits, each_row,
                    (zeros, none, zeros + 1, none), made, 0,
                )  # fmt: skip

                assert torch.equal(made, (codes @ numbers.T).float())


@pytest.mark.skipif(not jit.has_vnni(), reason="no AVX512-VNNI, or capped")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_as_digits_in_tiles_are_the_rows(bits: int, dtype: torch.dtype, threads: int) -> None:
    for rows, columns, outputs, group in (
        (1, 1, 1, 0), (5, 131, 33, 32), (16, 264, 70, 64), (70, 300, 9, 0), (300, 96, 40, 32),
    ):  # fmt: skip
        weight, bias = make(outputs, columns, bits, zero=True, group=group), torch.randn(outputs)
        x = torch.randn(rows, columns).to(dtype)
        x[0, -1] = torch.inf if group else -torch.tensor(torch.nan)
        assert digits.in_tiles(weight) or 0 < group < 4 * layout.phases(bits)
        right = x.double() @ weight.dequantize(torch.float64).T + bias
        size = x[1:].double().abs() @ weight.dequantize(torch.float64).abs().T + bias.abs()

        made = digits.product_in_tiles(x, weight, bias)

        assert made.dtype == dtype and made[0].isnan().all()
        slack = 3e-6 if dtype == torch.float32 else 2.0**-8
        most = float(size.max()) if len(size) else 0.0
        torch.testing.assert_close(made[1:].double(), right[1:], rtol=0, atol=slack * most)


@pytest.mark.skipif(not jit.has_vnni(), reason="no AVX512-VNNI, or capped")
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_rounded_and_multiplied_in_one_call_as_apart(
    bits: int, dtype: torch.dtype, threads: int
) -> None:
    weight, bias = make(70, 131, bits, zero=True), torch.randn(70)
    x, ends = torch.randn(5, 131).to(dtype), (torch.tensor(-1.5), torch.tensor(2.0))
    x[1, 3] = torch.nan
    for low, high in ((None, None), ends):
        rounded = cpu_rows.rows_of(x, 8, low, high, sums=True)

        made = cpu_rounded.few_rows(x, weight, bias, 8, low, high)

        twin = cpu_rounded.product(rounded, weight, bias, dtype, way="vnni")
        torch.testing.assert_close(made, twin, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_products_with_vpdpbusd_are_not_offered_where_vnni_is_capped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    jit.has_vnni.cache_clear()
    try:
        assert not jit.has_vnni()
        assert integer_sums.exactness("vnni", torch.uint8) == ""
    finally:
        jit.has_vnni.cache_clear()


def test_products_of_16_bits_are_not_offered_where_avx2_is_capped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    jit.has_avx2.cache_clear()
    try:
        assert not jit.has_avx2()
        assert integer_sums.exactness("madd", torch.uint8) == ""
    finally:
        jit.has_avx2.cache_clear()


def test_an_error_in_a_part_is_raised(threads: int) -> None:
    def work(begin: int, end: int) -> None:
        raise ValueError(f"{begin}")

    with pytest.raises(ValueError, match=r"\d"):
        jit.in_parts(work, 300)


def _in_a_child() -> None:
    jit.in_parts(lambda a, b: None, 300)


@pytest.mark.filterwarnings("ignore:This process")  # multi-threaded, and forks: that is the test
def test_threads_are_made_anew_in_a_forked_process() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        done: list[tuple[int, int]] = []
        jit.in_parts(lambda a, b: done.append((a, b)), 300)

        child = multiprocessing.get_context("fork").Process(target=_in_a_child, daemon=True)
        child.start()
        child.join(60)
    finally:
        torch.set_num_threads(before)

    assert sorted(done) == [(0, 100), (100, 200), (200, 300)]
    assert child.exitcode == 0
