"""A few rows on a CPU against the reference: every width of code, ragged columns, groups that
divide nothing, tables of every shape.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsearch_kernels import cpu, dequantize_gemm, layout, reference, small_m
from qsearch_kernels.weight import Weight
from tests.kernels.test_cpu import TOLERANCE, agree, arguments, check_linear, make

SHAPES = [
    (1, 1, 8),
    (2, 1, 8),
    (1, 2, 9),
    (1, 13, 5),
    (2, 33, 7),
    (5, 129, 70),
    (16, 65, 9),
    (17, 40, 6),
]  # rows, inputs, outputs
GROUPS = [0, -1, 5, 8, 24]


def check(w: Weight, m: int, dtype: torch.dtype) -> None:
    check_linear(torch.randn(m, w.columns).to(dtype), w, torch.randn(len(w.codes)))


def shared(w: Weight) -> Weight:
    """The same with one scale and one zero for all."""
    return w._replace(scale=w.scale[:1, :1], zero=None if w.zero is None else w.zero[:1, :1])


def tables(w: Weight, per_group: bool) -> Weight:
    shape = (*w.scale.shape, 2**w.bits) if per_group else (2**w.bits,)
    codes = layout.unsigned(w.codes) if w.bits == 8 else w.codes
    return w._replace(codes=codes, levels=torch.randn(shape).half(), offset=0.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_any_width_and_group_are_the_reference(
    bits: int, zero: bool, dtype: torch.dtype
) -> None:
    for (m, k, n), group in [(shape, group) for shape in SHAPES for group in GROUPS]:
        w = make(n, k, bits, zero=zero, group=group)
        check(shared(w) if group == -1 else w, m, dtype)


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_tables_of_any_size_and_shape_are_the_reference(bits: int, per_group: bool) -> None:
    for (m, k, n), group in [(shape, group) for shape in SHAPES for group in (0, 5, 8, 24)]:
        check(
            tables(make(n, k, bits, zero=not per_group, group=group), per_group), m, torch.float32
        )


def test_double_precision_keeps_its_digits() -> None:
    for group in (0, 8):
        w, x = make(6, 40, 4, zero=True, group=group), torch.randn(2, 40, dtype=torch.float64)

        torch.testing.assert_close(
            cpu.linear(x, w, None), x @ w.dequantize(torch.float64).T, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("columns", [1151, 2304])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_pieces_of_a_weight_fit_together(
    bits: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_m, "_BYTES", 1)  # the least piece has 64 rows
    monkeypatch.setattr(dequantize_gemm, "_WEIGHTS", (1, 1))
    for group in (0, 64):
        for m in (1, 3):
            check(make(150, columns, bits, zero=True, group=group), m, torch.bfloat16)


@pytest.mark.skipif(
    not small_m.exact(),
    reason="this core's products of bytes saturate, and its weights are widened",
)
@pytest.mark.parametrize("count", [1, 3])
def test_the_longest_row_of_the_largest_bytes_adds_up(count: int) -> None:
    w = make(2, small_m.LONGEST, 7, zero=True)
    w = w._replace(
        codes=torch.full_like(w.codes, 255), zero=torch.zeros_like(w.zero)
    )  # every bit of every plane: 127
    x = torch.full((count, small_m.LONGEST), 3.0)

    assert small_m.takes(w)
    expected = reference.linear_wna16(x.double(), **arguments(w))  # type: ignore[arg-type]
    agree(cpu.linear_by("digits", x, w, None), expected, torch.float32)
    assert not small_m.takes(make(2, small_m.LONGEST + 1, 7))


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad: float, group: int) -> None:
    w, x = make(5, 24, 4, group=group), torch.randn(3, 24)
    x[1, 3] = bad

    among, alone = cpu.linear(x, w, None), cpu.linear(x[1:2], w, None)

    for y in (among[1], alone[0]):
        assert not torch.isfinite(y).any()
    agree(among[[0, 2]], reference.linear_wna16(x[[0, 2]].double(), **arguments(w)), torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [0, 8, 5])
@pytest.mark.parametrize(
    ("rows", "columns", "outputs"), [(0, 24, 5), (2, 24, 0), (1, 24, 0), (2, 0, 5)]
)
def test_nothing_gives_nothing(rows: int, columns: int, outputs: int, group: int) -> None:
    w = make(outputs, columns, 4, group=group)
    bias = torch.randn(outputs)

    y = cpu.linear(torch.randn(rows, columns), w, bias)

    assert torch.equal(y, bias.expand(rows, outputs))


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(1, 40),
        torch.randn(1, 40) * 1e25,
        torch.randn(1, 40) * 1e-20,
        torch.full((1, 40), -3.0),
    ],
)
def test_rows_of_any_size_keep_their_digits(row: Tensor) -> None:
    w = make(6, 40, 4, zero=True)

    for x in (row, row.repeat(2, 1)):
        expected = reference.linear_wna16(x.double(), **arguments(w))  # type: ignore[arg-type]
        torch.testing.assert_close(
            cpu.linear(x, w, None).double(),
            expected,
            rtol=0,
            atol=2e-6 * float(expected.abs().max()),
        )


@pytest.mark.parametrize("m", [1, 3])
def test_a_machine_whose_bytes_are_not_exact_widens_instead(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = make(6, 40, 4, zero=True)
    assert small_m.takes(w) == small_m.exact()
    monkeypatch.setattr(small_m, "exact", lambda: False)
    monkeypatch.setattr(small_m, "product", None)

    check(w, m, torch.float32)


def test_saturating_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = small_m.exact.__wrapped__
    product = torch._int_mm
    for wrong in (
        lambda a, b: product(a, b).clamp(min=-(2**15) * 32),
        lambda a, b: product(a, b) if len(a) > 1 else product(a, b) + 1,
        None,
    ):
        monkeypatch.setattr(torch, "_int_mm", wrong or _none)
        assert not exact()


def _none(a: Tensor, b: Tensor) -> Tensor:
    raise RuntimeError("Expected self dtype to be of type int8 but got unsigned char")


def test_integers_with_one_scale_are_multiplied_as_bytes_and_groups_are_not() -> None:
    assert [small_m.takes(make(3, 24, bits)) for bits in range(1, 9)] == [small_m.exact()] * 7 + [
        False
    ]
    assert not small_m.takes(make(3, 24, 4, group=8))
    assert not small_m.takes(tables(make(3, 24, 4), per_group=False))
    assert dequantize_gemm.takes(make(3, 24, 4, group=8))
    assert not dequantize_gemm.takes(make(3, 24, 4, group=5))
