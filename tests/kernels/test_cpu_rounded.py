"""Rounded products on a CPU: with signed and unsigned bytes, rounded once for all readers, and
taken apart for a compiler.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from qsearch_kernels import (
    cpu,
    cpu_rounded,
    cpu_rows,
    integer_sums,
    jit,
    ops,
    products,
    reference,
    small_m,
)
from qsearch_kernels.weight import Weight

from .made_up_cores import table
from .test_activation_cache import INDUCTOR, graph_of, rounded_in
from .test_cpu import agree, arguments, make

STATIC = {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])}


def needs_int_mm() -> None:
    """Skip where compilers get the product of bytes whole, since this core has a faster exact one
    than torch's own.
    """
    if not products.fused_int_mm():
        pytest.skip("this core has a faster exact product of bytes than torch's own")


def expected(x: Tensor, w: Weight, bias: Tensor | None = None, **ends: Tensor) -> Tensor:
    return reference.linear_wnaxi(x.float(), **arguments(w), activation=8, bias=bias, **ends)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "zero"), [*itertools.product((2, 4, 5, 8), (False, True))])
def test_a_torch_that_takes_no_unsigned_bytes_is_given_signed_ones(
    bits: int, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if integer_sums.exactness("int_mm", torch.int8) != "all":
        pytest.skip("this core's products of signed bytes saturate")
    types = []
    multiply = torch._int_mm
    monkeypatch.setattr(
        torch, "_int_mm", lambda a, b, **named: types.append(a.dtype) or multiply(a, b, **named)
    )
    monkeypatch.setattr(small_m, "exact", lambda: False)
    with products.using(table(unsigned=False, wide="int_mm", narrow="int_mm")):
        for m, k, n in ((1, 33, 6), (5, 13, 7), (40, 64, 9)):
            w, x, bias = make(n, k, bits, zero=zero), torch.randn(m, k), torch.randn(n)

            agree(
                cpu.linear_rounded(x, w, bias, 8, None, None), expected(x, w, bias), torch.float32
            )
            agree(
                cpu.linear_rounded(x, w, bias, 8, **STATIC),
                expected(x, w, bias, **STATIC),
                torch.float32,
            )
        picture, kernel = torch.randn(2, 4, 5, 5) + 1, make(6, 36, bits, zero=zero)
        places = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
        made = ops.conv2d_rounded(picture, kernel, None, 8, **places)
    agree(
        made,
        reference.conv2d_wnaxi(picture, **arguments(kernel), activation=8, **places),
        torch.float32,
    )  # type: ignore[arg-type]

    assert set(types) == {torch.int8}


def test_where_unsigned_bytes_are_exact_the_rows_are_unsigned() -> None:
    if not products.table().unsigned:
        pytest.skip("this torch multiplies no unsigned bytes")
    x = torch.randn(5, 13)

    rounded = cpu_rows.rows_of(x, 8, None, None, sums=True)

    assert rounded.codes.dtype == torch.uint8
    assert rounded.sums is not None
    assert torch.equal(rounded.sums[:, 0], rounded.codes.float().sum(-1))
    assert torch.equal(rounded.scale * (rounded.codes - rounded.zero), reference.rounded(x, 8))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["8", "8 zero", "3 zero", "5", "e2m1", "tensor"])
def test_a_convolution_takes_weights_of_every_kind_and_pictures_in_every_order(
    kind: str, kernel: tuple[int, int], channels: int
) -> None:
    halves = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 4
    columns = channels * kernel[0] * kernel[1]
    w = (
        make(4, columns, 4, levels=torch.cat([halves, -halves]))
        if kind == "e2m1"
        else make(4, columns, 4 if kind == "tensor" else int(kind[0]), zero="zero" in kind)
    )
    w = w._replace(scale=w.scale[:1], group=-1) if kind == "tensor" else w
    x, bias = torch.randn(2, channels, 7, 6) + 1, torch.randn(4)
    places = {"kernel": kernel, "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    right = reference.conv2d_wnaxi(x, **arguments(w), activation=8, bias=bias, **places)  # type: ignore[arg-type]
    ends = {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])}

    for given in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.flip(3).flip(3),
        x.repeat(1, 1, 1, 2)[..., :6],
    ):
        agree(ops.conv2d_rounded(given, w, bias, 8, **places), right, torch.float32)
    agree(
        ops.conv2d_rounded(x, w, bias, 8, **places, **ends),
        reference.conv2d_wnaxi(x, **arguments(w), activation=8, bias=bias, **places, **ends),
        torch.float32,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("wide", [small_m.LONGEST, small_m.LONGEST + 1])
def test_sums_of_the_longest_rows_fit_32_bits_and_longer_ones_are_not_taken(wide: int) -> None:
    codes = torch.full((16, wide), -128, dtype=torch.int8)  # times 255, where bytes are unsigned
    w = Weight(codes, torch.ones(16, 1).half(), None, 128.0, None, 8, wide, 0)

    assert cpu_rounded.in_bytes(w) == (wide == small_m.LONGEST)
    if wide == small_m.LONGEST:
        made = cpu.linear_rounded(torch.ones(17, wide), w, None, 8, None, None)
        torch.testing.assert_close(made, torch.full((17, 16), -128.0 * wide), rtol=1e-3, atol=0)


def test_many_rows_are_rounded_and_multiplied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w, packed, x = make(70, 24, 8, zero=True), make(600, 24, 3), torch.randn(700, 24)
    whole = [cpu.linear_rounded(x, each, None, 8, None, None) for each in (w, packed)]
    monkeypatch.setattr(cpu_rounded, "_NUMBERS", 24 * 13)
    monkeypatch.setattr(cpu_rounded, "_SPREAD", 24 * 70)

    for each, right in zip((w, packed), whole, strict=True):
        torch.testing.assert_close(
            cpu.linear_rounded(x.clone(), each, None, 8, None, None), right, rtol=1e-6, atol=1e-5
        )


def test_three_layers_on_a_cpu_that_are_given_one_tensor_round_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounded: list[Tensor] = []
    rows_of = cpu.rows_of
    monkeypatch.setattr(
        cpu,
        "rows_of",
        lambda rows, *given, **named: (
            rounded.append(rows.clone()) or rows_of(rows, *given, **named)
        ),
    )
    q, k, v = (make(n, 64, 8) for n in (6, 7, 5))
    uneven = make(6, 64, 4, zero=True)
    x = torch.randn(2, 20, 64)

    for w in (q, k, v):
        agree(ops.linear_rounded(x, w, None, 8), expected(x, w), torch.float32)
    assert len(rounded) == 1
    x.mul_(2)
    agree(ops.linear_rounded(x, q, None, 8), expected(x, q), torch.float32)
    agree(
        ops.linear_rounded(x, uneven, None, 8), expected(x, uneven), torch.float32
    )  # wants the sums of rows too
    agree(ops.linear_rounded(x, k, None, 8, **STATIC), expected(x, k, **STATIC), torch.float32)
    assert len(rounded) == 4


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_is_taken_apart_computes_what_the_whole_one_does(
    dtype: torch.dtype, zero: bool, static: bool
) -> None:
    w, x, bias = make(6, 21, 8, zero=zero), torch.randn(4, 15, 21).to(dtype), torch.randn(6)
    ends = STATIC if static else {}

    with torch.no_grad():
        made = torch.compile(
            lambda x: ops.linear_rounded(x, w, bias, 8, **ends), backend="aot_eager", fullgraph=True
        )(x)

    agree(made, expected(x, w, bias, **ends), dtype)


@INDUCTOR
def test_what_inductor_writes_keeps_every_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_int_mm()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    w, x, bias = make(6, 21, 8, zero=True), torch.randn(4, 15, 21), torch.randn(6)
    layer: Any = lambda x: ops.linear_rounded(x, w, bias, 8)  # noqa: E731

    with torch.no_grad():
        made, [code] = run_and_get_code(torch.compile(layer, fullgraph=True), x)

    assert "_int_mm" in code
    assert "linear_rounded" not in code
    agree(made, expected(x, w, bias), torch.float32)


@INDUCTOR
@pytest.mark.slow
def test_a_compiled_row_on_a_cpu_that_is_not_finite_does_not_become_a_number() -> None:
    w, x = make(6, 64, 8), torch.randn(40, 64)
    x[1, 3], x[2, 63], x[3, 0] = torch.nan, torch.inf, -torch.inf

    with torch.no_grad():
        made = torch.compile(
            lambda x: ops.linear_rounded(x + 0.5, w, None, 8, **STATIC), fullgraph=True
        )(x)

    assert made[1:4].isnan().all()
    assert made[[0, *range(4, 40)]].isfinite().all()


def test_a_graph_on_a_cpu_rounds_once_what_three_layers_read() -> None:
    needs_int_mm()
    weights = [make(n, 64, 8) for n in (6, 7, 5)]

    def block(x: Tensor) -> list[Tensor]:
        h = F.layer_norm(x, x.shape[-1:]) * 2
        return [ops.linear_rounded(h, w, None, 8) for w in weights]

    assert rounded_in(graph_of(block, torch.randn(2, 48, 64))) == 1
    torch._dynamo.reset()
    targets = [node.target for node in graph_of(block, torch.randn(2, 3, 64)).nodes]
    assert targets.count(torch.ops.qsearch_kernels.linear_rounded.default) == 3


def test_where_a_gradient_is_wanted_a_compiler_gets_the_whole_product() -> None:
    w, x = make(6, 64, 8), torch.randn(40, 64, requires_grad=True)

    made = torch.compile(
        lambda x: ops.linear_rounded(x * 2, w, None, 8), backend="aot_eager", fullgraph=True
    )(x)
    made.sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * torch.ones(40, 6) @ w.dequantize(torch.float32))


@pytest.mark.skipif(not jit.has_avx2(), reason="16-bit products take numba and AVX2")
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["own ends", "given ends"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_few_rows_in_one_call_are_the_same_product(
    rows: int, zero: bool, given: bool, dtype: torch.dtype
) -> None:
    x, weight, bias = torch.randn(rows, 70).to(dtype), make(37, 70, 8, zero=zero), torch.randn(37)
    low, high = (torch.tensor([-1.5]), torch.tensor([2.0])) if given else (None, None)

    made = cpu_rounded.few_rows(x, weight, bias, 6, low, high, "madd")

    rounded = cpu_rows.rows_of(x, 6, low, high, sums=cpu_rounded.uneven(weight))
    assert made.dtype == dtype
    assert torch.equal(made, cpu_rounded.product(rounded, weight, bias, dtype, way="madd"))
