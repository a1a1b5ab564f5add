"""Every product of this core's table against the reference: at the ends of the range, on ragged
shapes, under every instruction set that it has; and how weights are split where it saturates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch_kernels import (
    cpu_rounded,
    cpu_rows,
    integer_sums,
    layout,
    ops,
    products,
    reference,
    saturation,
)
from qsearch_kernels.weight import Weight

from .made_up_cores import table
from .test_cpu import agree, arguments, make

REPOSITORY = Path(__file__).parents[2]
#: what makes this core an older one; without AVX2 or AVX-512 they say what is there anyway
LEVELS = {
    "native": {},
    "avx512_core_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512_core_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_core": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2",
    },
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
#: those below what this core has; the quick ones are its own and the oldest
OWN = torch.backends.cpu.get_cpu_capability()
HERE = [
    pytest.param(level, marks=() if level in ("native", "sse41") else pytest.mark.slow)
    for level in LEVELS
    if level in ("native", "sse41") or OWN == "AVX512"
]


def extremes(rows: int, columns: int, outputs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations of 8 bits and weights of 8 bits: drawn, and at the ends of both ranges."""
    drawn = torch.randint(0, 256, (rows, columns))
    weights = torch.randint(-128, 128, (outputs, columns))
    signs = torch.where(torch.rand(outputs, columns) < 0.5, -128, 127)
    for codes in (drawn, torch.full_like(drawn, 255), (drawn > 127) * 255):
        for matrix in (
            weights,
            signs,
            torch.full_like(weights, -128),
            torch.full_like(weights, 127),
        ):
            yield codes, matrix


SHAPES = [
    (1, 2, 1),
    (1, 33, 7),
    (3, 64, 5),
    (17, 130, 40),
    (70, 261, 19),
    (65, 520, 9),
    (9, 1029, 8),
]


def check_every_product() -> int:
    """Every product of this core's table against the reference; how many comparisons that were."""
    known, compared = products.table(), 0
    form = torch.uint8 if known.unsigned else torch.int8
    for kind in ("wide", "narrow"):
        for way in known.seconds[kind]:
            for rows, columns, outputs in SHAPES:
                for codes, matrix in extremes(rows, columns, outputs):
                    given = matrix if kind == "wide" else (matrix.remainder(16))
                    bits = 8 if kind == "wide" else 4
                    stored = given.to(torch.int8) if bits == 8 else layout.pack(given, 4)
                    ones = torch.ones(outputs, 1).half()
                    weight = Weight(stored, ones, None, 128.0 * (bits == 8), None, bits, columns, 0)
                    shifted = codes if known.unsigned else codes - 128
                    one = torch.ones(rows, 1)
                    sums = shifted.sum(-1, keepdim=True).float()
                    largest = 255 if known.unsigned else 128
                    rounded = cpu_rows.Bytes(shifted.to(form), one, one * 0, sums * 0, largest)
                    right = (shifted.double() @ given.double().T).float()

                    made = cpu_rounded.product(rounded, weight, None, torch.float32, way=way)

                    torch.testing.assert_close(made, right, rtol=2**-23, atol=0)
                    if float(right.abs().max()) < 2**24:
                        assert torch.equal(made, right), (kind, way, rows, columns, outputs)
                    compared += 1
    return compared


def check_every_scheme() -> int:
    """Layers of every kind, by whatever serves them here, against the plain twins."""
    compared = 0
    for bits, zero, group in (
        (8, False, 0),
        (8, True, 0),
        (7, True, 0),
        (4, False, 0),
        (3, True, 0),
        (4, True, 8),
    ):
        for m, k, n in ((1, 40, 9), (5, 48, 70), (40, 264, 33), (300, 40, 70)):
            weight, bias = make(n, k, bits, zero=zero, group=group), torch.randn(n)
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(m, k).to(dtype)
                right = reference.linear_wna16(x.double(), **arguments(weight), bias=bias)  # type: ignore[arg-type]
                size = float((x.double().abs() @ weight.dequantize(torch.float64).abs().T).max())
                made = ops.linear(x, weight, bias)
                slack = 2e-6 if dtype == torch.float32 else 2**-7
                torch.testing.assert_close(made.double(), right, rtol=0, atol=slack * size)
                compared += 1
                if group:
                    continue
                for activation in (8, 7, 4):
                    twin = reference.linear_wnaxi(
                        x.float(), **arguments(weight), activation=activation, bias=bias
                    )  # type: ignore[arg-type]
                    agree(ops.linear_rounded(x, weight, bias, activation), twin, dtype)
                    compared += 1
    for bits, channels, kernel in ((8, 5, (3, 3)), (8, 4, (1, 1)), (7, 3, (3, 2)), (4, 8, (3, 3))):
        weight = make(6, channels * kernel[0] * kernel[1], bits)
        x = torch.randn(2, channels, 9, 8)
        places = {"kernel": kernel, "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
        twin = reference.conv2d_wnaxi(x, **arguments(weight), activation=8, **places)  # type: ignore[arg-type]
        agree(ops.conv2d_rounded(x, weight, None, 8, **places), twin, torch.float32)
        compared += 1
    return compared


@pytest.mark.parametrize("level", HERE)
def test_every_product_and_every_scheme_is_the_reference_on_every_instruction_set(
    level: str, tmp_path: Path
) -> None:
    script = (
        "import torch; torch.manual_seed(0)\n"
        "from tests.kernels import test_integer_sums as t\n"
        "from qsearch_kernels import products\n"
        "print(products.table().exact, t.check_every_product(), t.check_every_scheme())"
    )
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    given = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": paths, **LEVELS[level]}

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY, env={**os.environ, **given}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    *_, products_, schemes = done.stdout.split()
    assert int(products_) >= 4 * 12 * len(SHAPES)  # two kinds, two products at least
    assert int(schemes) > 100
    assert len(list((tmp_path / "qsearch").glob("products-*.json"))) == 1


@pytest.mark.parametrize("way", ["int_mm + rest", "onednn + rest", "fp32", "madd"])
def test_weights_of_8_bits_are_exact_by_every_product_of_a_core_that_saturates(way: str) -> None:
    values = torch.randn(33, 520)
    codes = (values / values.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
    weight = Weight(codes, torch.ones(33, 1).half(), None, 128.0, None, 8, 520, 0)
    x = torch.randn(70, 520)

    with products.using(table(exact="pairs", wide=way)):
        made = ops.linear_rounded(x, weight, None, 8)

    agree(made, reference.linear_wnaxi(x, **arguments(weight), activation=8), torch.float32)  # type: ignore[arg-type]


def test_a_split_weight_and_its_rest_are_the_weight_and_no_pair_exceeds() -> None:
    values = torch.randn(40, 131)
    matrix = (values / values.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)

    rest = saturation.split(matrix)

    assert rest is not None
    left = saturation.without(matrix, rest)
    codes = torch.randint(0, 256, (70, 131), dtype=torch.uint8)
    exceeding = matrix.short() - left
    assert 0 < len(rest.place) == int((exceeding != 0).sum())
    pairs = F.pad(left, (0, 1)).short().unflatten(1, (-1, 2))
    assert int((pairs.clamp(min=0).sum(-1)).max()) <= 128
    assert int((pairs.clamp(max=0).sum(-1)).min()) >= -128
    made = saturation.add_rest(torch.zeros(70, 40), codes, rest)
    assert torch.equal(made.double(), codes.double() @ exceeding.double().T)
    for begin, end in ((0, 7), (7, 40), (39, 50)):
        part = rest.part(begin, end, 131)
        whole = saturation.add_rest(torch.zeros(70, min(end, 40) - begin), codes, part)
        assert torch.equal(whole, made[:, begin:end])


def test_a_weight_that_exceeds_everywhere_is_not_split() -> None:
    assert saturation.split(torch.full((8, 64), 127, dtype=torch.int8)) is None
    weight = Weight(
        torch.full((8, 64), 127, dtype=torch.int8), torch.ones(8, 1), None, 128.0, None, 8, 64, 0
    )
    x = torch.rand(20, 64)

    with products.using(table(exact="pairs", wide="int_mm + rest")):
        made = ops.linear_rounded(x, weight, None, 8)

    agree(made, reference.linear_wnaxi(x, **arguments(weight), activation=8), torch.float32)  # type: ignore[arg-type]


def test_a_rest_is_worked_out_anew_when_the_codes_are_written_over() -> None:
    first, second = (torch.randn(9, 64).mul(40).clamp(-127, 127).to(torch.int8) for _ in range(2))
    weight, x = Weight(first, torch.ones(9, 1), None, 128.0, None, 8, 64, 0), torch.rand(20, 64)
    with products.using(table(exact="pairs", wide="int_mm + rest")):
        ops.linear_rounded(x, weight, None, 8)
        first.copy_(second)

        made = ops.linear_rounded(x, weight, None, 8)

    agree(made, reference.linear_wnaxi(x, **arguments(weight), activation=8), torch.float32)  # type: ignore[arg-type]


def test_a_product_that_saturates_is_noticed_and_one_that_is_wrong_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pairs(matrix: Tensor, largest: int) -> integer_sums.Sums:
        def sums(codes: Tensor) -> Tensor:
            a, b = (F.pad(v.double(), (0, v.shape[1] % 2)) for v in (codes, matrix))
            each = a[:, None] * b[None]
            return each.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1).float()

        return sums

    def off(matrix: Tensor, largest: int) -> integer_sums.Sums:
        return lambda codes: codes.float() @ matrix.float().T + (len(codes) > 3)

    monkeypatch.setitem(integer_sums.PRODUCTS, "int_mm", pairs)
    assert integer_sums.exactness("int_mm", torch.uint8) == "pairs"
    monkeypatch.setitem(integer_sums.PRODUCTS, "int_mm", off)
    assert integer_sums.exactness("int_mm", torch.uint8) == ""


@pytest.mark.parametrize(
    ("activation", "weight", "fits"),
    [(255, 64, True), (255, 65, False), (127, 128, True), (128, 128, False), (255, 15, True)],
)
def test_pairs_of_products_fit_16_bits_up_to_7_bits_of_one_operand(
    activation: int, weight: int, fits: bool
) -> None:
    assert integer_sums.fits_pairs(activation, weight) == fits
