"""The table of products: exact at the ends of the range under every instruction set that this core
has, chosen by time, kept on disk, and safe to ask for by several processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch_kernels import (
    bench,
    cpu,
    cpu_rounded,
    integer_sums,
    ops,
    product_table,
    product_timing,
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
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has asked for no table yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QSEARCH_PRODUCTS", raising=False)
    products.forget()
    yield tmp_path
    products.forget()


def extremes(rows: int, columns: int, outputs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations of 8 bits and weights of 8 bits: drawn, and at the ends of both ranges."""
    drawn = torch.randint(0, 256, (rows, columns))
    weights = torch.randint(-128, 128, (outputs, columns))
    signs = torch.where(torch.rand(outputs, columns) < 0.5, -128, 127)
    for codes in (drawn, torch.full_like(drawn, 255), (drawn > 127) * 255):
        for matrix in (weights, signs, torch.full_like(weights, -128), torch.full_like(weights, 127)):
            yield codes, matrix


SHAPES = [(1, 2, 1), (1, 33, 7), (3, 64, 5), (17, 130, 40), (70, 261, 19), (65, 520, 9), (9, 1029, 8)]


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
                    stored = given.to(torch.int8) if bits == 8 else _packed(given)
                    ones = torch.ones(outputs, 1).half()
                    weight = Weight(stored, ones, None, 128.0 * (bits == 8), None, bits, columns, 0)
                    shifted = codes if known.unsigned else codes - 128
                    one = torch.ones(rows, 1)
                    sums = shifted.sum(-1, keepdim=True).float()
                    largest = 255 if known.unsigned else 128
                    rounded = cpu_rounded.Bytes(shifted.to(form), one, one * 0, sums * 0, largest)
                    right = (shifted.double() @ given.double().T).float()

                    made = cpu_rounded.product(rounded, weight, None, torch.float32, way=way)

                    torch.testing.assert_close(made, right, rtol=2**-23, atol=0)
                    if float(right.abs().max()) < 2**24:
                        assert torch.equal(made, right), (kind, way, rows, columns, outputs)
                    compared += 1
    return compared


def _packed(codes: Tensor) -> Tensor:
    from qsearch_kernels import layout

    return layout.pack(codes, 4)


def check_every_scheme() -> int:
    """Layers of every kind, by whatever serves them here, against the plain twins."""
    compared = 0
    for bits, zero, group in ((8, False, 0), (8, True, 0), (7, True, 0), (4, False, 0), (3, True, 0), (4, True, 8)):
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
                    twin = reference.linear_wnaxi(x.float(), **arguments(weight), activation=activation, bias=bias)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("level", LEVELS)
def test_every_product_and_every_scheme_is_the_reference_on_every_instruction_set(level: str, tmp_path: Path) -> None:
    script = (
        "import torch; torch.manual_seed(0)\n"
        "from tests.kernels import test_products as t\n"
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


@pytest.mark.parametrize("way", ["int_mm + rest", "onednn + rest", "fp32"])
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
    weight = Weight(torch.full((8, 64), 127, dtype=torch.int8), torch.ones(8, 1), None, 128.0, None, 8, 64, 0)
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
def test_pairs_of_products_fit_16_bits_up_to_7_bits_of_one_operand(activation: int, weight: int, fits: bool) -> None:
    assert integer_sums.fits_pairs(activation, weight) == fits


def test_the_fastest_way_of_each_range_of_rows_is_taken() -> None:
    made = table()
    seconds = {**made.seconds, "wide": {"int_mm": (4.0, 1.0, 4.0, 4.0), "fp32": (2.0, 2.0, 2.0, 5.0)}}

    with products.using(made._replace(seconds=seconds)):
        found = {rows: products.way("wide", rows) for rows in (1, 2, 16, 17, 128, 129, 10**6)}

    assert found == {1: "fp32", 2: "int_mm", 16: "int_mm", 17: "fp32", 128: "fp32", 129: "int_mm", 10**6: "int_mm"}


def test_bf16_without_units_is_computed_in_fp32_and_handed_back() -> None:
    x, weight = torch.randn(30, 24).bfloat16(), torch.randn(5, 24).bfloat16()

    with products.using(table(keep_bf16="fp32", W8_bf16="fp32")):
        assert products.float_type(torch.bfloat16) == torch.float32
        assert products.float_type(torch.float32) == torch.float32
        made, bytes_ = ops.dense_linear(x, weight), ops.linear(x, make(5, 24, 8))
    with products.using(table(keep_bf16="bf16")):
        assert products.float_type(torch.bfloat16) == torch.bfloat16

    right = F.linear(x.float(), weight.float()).bfloat16()
    assert made.dtype == bytes_.dtype == torch.bfloat16
    torch.testing.assert_close(made, right, rtol=2**-8, atol=0)


def test_a_compiler_writes_int_mm_into_its_graph_only_where_it_is_exact_and_fastest() -> None:
    with products.using(table(wide="int_mm")):
        assert products.fused_int_mm()
    for other in (table(wide="fp32"), table(exact="pairs", wide="int_mm + rest"), table(unsigned=False, wide="int_mm")):
        with products.using(other):
            assert not products.fused_int_mm()


def test_a_compiled_layer_on_a_core_without_int_mm_computes_the_same() -> None:
    weight, x = make(6, 64, 8), torch.randn(40, 64)

    with torch.no_grad(), products.using(table(wide="fp32")):
        compiled = torch.compile(lambda x: ops.linear_rounded(x, weight, None, 8), backend="aot_eager", fullgraph=True)
        made = compiled(x)
    torch._dynamo.reset()

    agree(made, reference.linear_wnaxi(x, **arguments(weight), activation=8), torch.float32)  # type: ignore[arg-type]


def test_the_table_is_timed_once_and_read_from_disk_after(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(product_timing, "timed", lambda: asked.append(1) or table(wide="fp32"))

    assert products.way("wide", 300) == "fp32"
    products.forget()
    assert products.way("wide", 300) == "fp32"

    assert len(asked) == 1
    [file] = (cache / "qsearch").iterdir()
    assert json.loads(file.read_text())["made on"] == product_table.core()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"made on": {"core": "another"}}', "no rows"], ids=str)
def test_a_broken_table_and_one_of_another_core_are_made_again(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = table(narrow="onednn")
    monkeypatch.setattr(product_timing, "timed", lambda: made)
    if content == "no rows":
        product_table.keep(made._replace(seconds={"wide": {"int_mm": (1.0,)}}))
    else:
        product_table.path().parent.mkdir()
        product_table.path().write_text(content)

    assert products.way("narrow", 1) == "onednn"
    assert product_table.load() == made


def test_what_was_given_up_stays_so_on_disk(cache: Path) -> None:
    made = table()._replace(seconds={"wide": {"int_mm": (1.0, math.inf, 2.0, math.inf)}})

    product_table.keep(made)

    assert product_table.load() == made


def test_another_torch_thread_count_or_cap_is_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {product_table.path()}
    for name, value in (("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ATEN_CPU_CAPABILITY", "avx2")):
        monkeypatch.setenv(name, value)
        known.add(product_table.path())
    monkeypatch.setattr(torch, "__version__", "9.9")
    known.add(product_table.path())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    known.add(product_table.path())

    assert len(known) == 5


def test_a_cache_that_can_not_be_written_costs_nothing_but_the_time(blocked_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked_folder))
    monkeypatch.setattr(product_timing, "timed", lambda: table(wide="onednn"))
    products.forget()

    assert products.way("wide", 1) == "onednn"
    products.forget()


def test_many_writers_at_once_leave_one_whole_table(cache: Path) -> None:
    made = table(wide="fp32")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: product_table.keep(made), range(40)))

    assert product_table.load() == made
    assert len(list((cache / "qsearch").iterdir())) == 1


def test_a_core_that_torch_does_not_know_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)

    assert product_table.core()["core"]


def test_the_plain_twins_serve_everything_where_they_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSEARCH_PRODUCTS", "reference")
    monkeypatch.setattr(torch, "_int_mm", None)
    weight, x = make(6, 36, 8), torch.randn(5, 36)
    places = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    picture = torch.randn(2, 4, 5, 5)

    assert torch.equal(ops.linear(x, weight), reference.linear_wna16(x, **arguments(weight)))  # type: ignore[arg-type]
    assert torch.equal(ops.linear_rounded(x, weight, None, 8), reference.linear_wnaxi(x, **arguments(weight), activation=8))  # type: ignore[arg-type]
    assert torch.equal(
        ops.conv2d_rounded(picture, weight, None, 8, **places), reference.conv2d_wnaxi(picture, **arguments(weight), activation=8, **places)  # type: ignore[arg-type]
    )  # fmt: skip
    assert not products.fused_int_mm()


def test_one_integer_product_can_be_forced_and_another_name_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(product_timing, "timed", lambda: table(exact="pairs", wide="fp32", narrow="fp32"))
    monkeypatch.setenv("QSEARCH_PRODUCTS", "onednn")
    assert (products.way("wide", 40), products.way("narrow", 40)) == ("onednn + rest", "onednn")

    monkeypatch.setenv("QSEARCH_PRODUCTS", "avx")
    with pytest.raises(ValueError, match="one of reference, int_mm, onednn, fp32 on this core; given 'avx'"):
        products.way("wide", 40)


def test_every_scheme_says_what_serves_it_and_what_it_is_worth() -> None:
    made = table(exact="pairs", wide="onednn + rest", narrow="int_mm", W8A8_fp32="rounded", keep_bf16="fp32")
    with products.using(made):
        rows = {(r["scheme"], r["inputs"], r["rows"]): r for r in products.describe()}

        assert rows["W8A8", "fp32", 256]["product"] == "onednn + rest"
        assert rows["W8A8", "fp32", 256]["x fp32"] == pytest.approx(10)
        assert rows["W4A8", "bf16", 1]["product"] == "int_mm"
        assert rows["W4 groups", "fp32", 8]["x fp32"] == pytest.approx(1)


def test_schemes_that_are_slower_here_than_full_precision_are_named() -> None:
    made = table(keep_fp32="fp32")  # ten times as fast as any scheme
    layers = [("int8-c+a8", make(6, 64, 8), 8, 256), ("uint4-c", make(6, 64, 4), None, 256)]

    with products.using(made):
        found = products.slower_than_keep(layers, torch.float32)
    with products.using(table(W8A8_fp32="rounded", W4_fp32="fp32")):
        none = products.slower_than_keep(layers, torch.float32)

    assert found == {"int8-c+a8": pytest.approx(10), "uint4-c": pytest.approx(10)}
    assert none == {}


@pytest.mark.parametrize(
    ("bits", "group", "activation", "kind"),
    [(8, 0, 8, "W8A8"), (8, 0, 7, "W8A7"), (4, 0, 8, "W4A8"), (8, 0, None, "W8"), (3, 0, None, "W4"), (4, 8, None, "W4 groups")],
)
def test_a_packed_weight_is_of_one_kind(bits: int, group: int, activation: int | None, kind: str) -> None:
    assert products.kind_of(make(6, 64, bits, group=group), activation) == kind


def test_this_core_has_a_whole_table() -> None:
    known = product_timing.timed()

    assert known.exact["fp32"] == "all"
    assert {kind.rpartition(" ")[0] for kind in known.seconds} - {"", "keep"} == set(products.SCHEMES)
    for ways in known.seconds.values():
        for place in range(len(product_table.ROWS)):
            assert math.isfinite(min(times[place] for times in ways.values()))


def test_weights_for_timing_are_those_of_a_layer() -> None:
    for bits, group in ((8, 0), (4, 0), (4, 64), (4, 48)):
        weight = bench.random_weight(20, 128, bits, group=group)
        values = weight.dequantize(torch.float32)

        assert cpu.linear(torch.randn(3, 128), weight, None).shape == (3, 20)
        assert float(values.abs().max()) == pytest.approx(float(weight.scale.max()) * (2 ** (bits - 1) - 1), rel=0.5)
        assert float(values.std()) == pytest.approx(1, abs=0.2)
