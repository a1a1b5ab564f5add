"""The CPU's products against the reference, on shapes that divide nothing, in every type and form
of input; and as torch's operators.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qsearch_kernels import cpu, cpu_rounded, layout, ops, reference
from qsearch_kernels.weight import Weight

SHAPES = [(1, 13, 5), (3, 1, 8), (3, 64, 7), (40, 33, 70), (600, 24, 9)]  # rows, inputs, outputs
#: largest error, of the largest output: digits hold 24 bits of fp32 and 16 of the halves, whose own
#: rounding is what is left
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
_DENSE = ("bf16", "bf16 tiles", "int8pack")  # ways that may round the weight to bf16


def make(
    n: int, k: int, bits: int, *, zero: bool = False, group: int = 0, levels: Tensor | None = None
) -> Weight:
    packed = layout.pack(torch.randint(0, 2**bits, (n, k)), bits)
    signed = bits == 8 and levels is None
    shape = (n, -(-k // group) if group > 0 else 1)
    offset = 0.0 if levels is not None else 2.0 ** (bits - 1)
    zeros = (torch.rand(shape) * 2**bits).half() if zero else None
    return Weight(
        layout.signed(packed) if signed else packed,
        torch.rand(shape).add(0.1).half(),
        zeros,
        offset,
        levels,
        bits,
        k,
        group,
    )


def arguments(w: Weight) -> dict[str, object]:
    return {
        "packed": w.codes,
        "scale": w.scale,
        "zero": w.offset if w.zero is None else w.zero,
        "bits": w.bits,
        "columns": w.columns,
        "group": w.group,
        "levels": w.levels,
    }


def agree(made: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert made.dtype == dtype
    assert made.shape == expected.shape
    torch.testing.assert_close(
        made.double(),
        expected.double(),
        rtol=0,
        atol=TOLERANCE[dtype] * max(1e-9, float(expected.abs().max())),
    )


def check_linear(x: Tensor, w: Weight, bias: Tensor) -> None:
    """`cpu.linear` against the reference: to one rounding of its type, or of a dense product in
    that type where this core has one that is faster.
    """
    dtype = x.dtype
    made, expected = (
        cpu.linear(x, w, bias),
        reference.linear_wna16(x.double(), **arguments(w), bias=bias),
    )  # type: ignore[arg-type]
    if dtype == torch.float32 or cpu.weight_way(w, len(x), dtype) not in _DENSE:
        agree(made, expected, dtype)
    else:  # it may round weight, bias, product and sum: half a unit each, of what is added up
        size = float((x.double().abs() @ w.dequantize(torch.float64).abs().T + bias.abs()).max())
        assert made.dtype == dtype
        torch.testing.assert_close(
            made.double(), expected.double(), rtol=0, atol=2 * TOLERANCE[dtype] * size
        )


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("columns", [1, 7, 8, 13, 24])
def test_codes_by_phase_are_the_codes_in_another_order(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    padded = -(-columns // layout.phases(bits)) * layout.phases(bits)
    out = torch.empty(3, padded, dtype=torch.uint8)

    layout.unpack_by_phase(layout.pack(codes, bits), bits, columns, out)

    x = torch.randint(-5, 6, (2, columns))
    assert torch.equal(layout.by_phase(x, bits) @ out.long().T, x @ codes.long().T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("bits", "zero"), [*itertools.product(range(2, 9), (False, True))])
def test_products_with_inputs_as_they_are_and_with_rounded_ones_are_the_reference(
    bits: int, zero: bool, dtype: torch.dtype
) -> None:
    for m, k, n in SHAPES:
        w, x, bias = make(n, k, bits, zero=zero), torch.randn(m, k).to(dtype), torch.randn(n)

        check_linear(x, w, bias)
        agree(
            cpu.linear_rounded(x, w, bias, 8, None, None),
            reference.linear_wnaxi(x.float(), **arguments(w), activation=8, bias=bias),
            dtype,
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [8, 6, 4])
def test_a_static_grid_is_one_for_all_rows(activation: int) -> None:
    w, x = make(6, 21, 4, zero=True), torch.randn(5, 21)
    ends = {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])}

    agree(
        cpu.linear_rounded(x, w, None, activation, **ends),
        reference.linear_wnaxi(x, **arguments(w), activation=activation, **ends),
        torch.float32,
    )  # type: ignore[arg-type]


def test_small_floats_whose_levels_are_whole_are_multiplied_as_bytes() -> None:
    halves = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 4
    w, x = make(6, 21, 4, levels=torch.cat([halves, -halves])), torch.randn(5, 21)

    assert cpu_rounded.in_bytes(w)
    agree(
        cpu.linear_rounded(x, w, None, 8, None, None),
        reference.linear_wnaxi(x, **arguments(w), activation=8),
        torch.float32,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("group", "levels"),
    [
        (4, None),
        (5, None),
        (0, torch.randn(16)),
        (0, torch.randn(6, 1, 16)),
        (5, torch.randn(6, 5, 16)),
    ],
)
def test_what_has_no_bytes_is_widened_and_refused_where_bytes_are_asked_for(
    group: int, levels: Tensor | None
) -> None:
    w, x = make(6, 21, 4, group=group, levels=levels), torch.randn(5, 21)

    agree(cpu.linear(x, w, None), reference.linear_wna16(x, **arguments(w)), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="products of bytes need one scale a row"):
        cpu.linear_rounded(x, w, None, 8, None, None)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (1, 2), (1, 2)),
        ((1, 1), (1, 1), (0, 0), (1, 1)),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_a_convolution_pads_with_the_code_of_zero(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    zero: bool,
) -> None:
    places = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    w, x, bias = (
        make(4, 5 * kernel[0] * kernel[1], 4, zero=zero),
        torch.randn(2, 5, 9, 7) + 3,
        torch.randn(4),
    )

    made = ops.conv2d_rounded(x, w, bias, 8, **places)

    agree(
        made,
        reference.conv2d_wnaxi(x, **arguments(w), activation=8, bias=bias, **places),
        torch.float32,
    )  # type: ignore[arg-type]


def test_an_empty_batch_gives_an_empty_result_and_strides_do_not_matter() -> None:
    w, x = make(5, 12, 4), torch.randn(12, 7)

    assert ops.linear(torch.randn(0, 12), w).shape == (0, 5)
    assert ops.linear_rounded(torch.randn(2, 0, 12), w, None, 8).shape == (2, 0, 5)
    assert torch.equal(
        ops.linear_rounded(x.T, w, None, 8), ops.linear_rounded(x.T.contiguous(), w, None, 8)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_become_a_number(bad: float) -> None:
    w, x = make(5, 12, 4), torch.randn(4, 12)
    x[2, 3] = bad

    for y in (ops.linear(x, w), ops.linear_rounded(x, w, None, 8)):
        assert not torch.isfinite(y[2]).any()
        assert torch.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("activation", [8, 6, 4])
@pytest.mark.parametrize(
    "row",
    [
        torch.randn(1, 12),
        torch.zeros(1, 12),
        torch.rand(1, 12) + 3,
        torch.randn(1, 12) * 1e30,
        torch.randn(1, 12) * 1e-20,
    ],
)
def test_one_row_alone_is_what_it_is_among_others(activation: int, row: Tensor) -> None:
    w, bias = make(5, 12, 8), torch.randn(5)

    alone, both = (ops.linear_rounded(x, w, bias, activation) for x in (row, row.repeat(2, 1)))

    torch.testing.assert_close(alone, both[:1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_row_that_is_not_finite_does_not_become_a_number(bad: float) -> None:
    x = torch.randn(1, 12)
    x[0, 3] = bad

    assert not torch.isfinite(ops.linear_rounded(x, make(5, 12, 8), None, 8)).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operators_keep_torchs_rules(bits: int) -> None:
    w, x = make(6, 16, bits, zero=True), torch.randn(3, 16)
    checks = ("test_schema", "test_faketensor")

    torch.library.opcheck(
        torch.ops.qsearch_kernels.linear.default, (x, *w, None), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.qsearch_kernels.linear_rounded.default,
        (x, *w, torch.randn(6), 8, None, None),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.qsearch_kernels.dequantize.default, (*w, torch.float32), test_utils=checks
    )
    picture, kernel = torch.randn(2, 4, 5, 5), make(6, 16, bits)
    torch.library.opcheck(
        torch.ops.qsearch_kernels.conv2d_rounded.default,
        (picture, *kernel, None, 8, [2, 2], [1, 1], [1, 1], [1, 1], None, None),
        test_utils=checks,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantizing_is_the_reference_in_every_type(dtype: torch.dtype) -> None:
    for bits, group in itertools.product(range(2, 9), (0, 5, -1)):
        w = make(1 if group == -1 else 7, 13, bits, group=group)

        expected = reference.dequantize(
            layout.unpack(w.codes, bits, 13), w.scale.float(), w.offset, group
        )
        assert torch.equal(ops.dequantize(w, dtype), expected.to(dtype))


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (3, 0), (4, 32)])
@pytest.mark.parametrize("static", [False, True])
def test_what_a_gpu_is_given_means_what_the_reference_means(
    bits: int, group: int, static: bool
) -> None:
    pytest.importorskip(
        "qsearch_kernels.gpu_ops",
        reason="the kernels for a GPU are not in this tree; on a CPU they are their twins",
    )
    w, x, bias = make(6, 64, bits, zero=True, group=group), torch.randn(5, 64), torch.randn(6)
    ends = (
        {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])}
        if static
        else {"low": None, "high": None}
    )

    assert "cuda" in ops.devices(w)
    agree(
        ops._gpu_linear_rounded(x, *w, bias, 8, *ends.values()),
        reference.linear_wnaxi(x, **arguments(w), activation=8, bias=bias, **ends),
        torch.float32,
    )  # type: ignore[arg-type]
    agree(
        ops._gpu_linear(x, *w, bias),
        reference.linear_wna16(x, **arguments(w), bias=bias),
        torch.float32,
    )  # type: ignore[arg-type]


def test_sums_of_rows_are_worked_out_anew_when_the_codes_are_written_over() -> None:
    w, other, x = make(6, 21, 4), make(6, 21, 4), torch.randn(5, 21)
    before = ops.linear_rounded(x, w, None, 8)

    w.codes.copy_(other.codes)

    after = ops.linear_rounded(x, w, None, 8)
    assert not torch.equal(before, after)
    agree(after, reference.linear_wnaxi(x, **arguments(w), activation=8), torch.float32)  # type: ignore[arg-type]


def test_a_weight_that_was_left_on_the_meta_device_is_refused() -> None:
    w = make(6, 21, 4)
    away = w._replace(codes=w.codes.to("meta"))

    for call in (
        lambda: ops.linear(torch.randn(5, 21), away),
        lambda: ops.linear_rounded(torch.randn(5, 21), away, None, 8),
    ):
        with pytest.raises(ValueError, match="inputs on cpu and codes on meta"):
            call()
