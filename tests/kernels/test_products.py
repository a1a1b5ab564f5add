"""The table of products: ways are chosen by time, kept on disk, and safe to ask for by several
processes; what a core lacks is computed otherwise, and said."""

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

from qsearch_kernels import (
    bench,
    cpu,
    ops,
    product_table,
    product_timing,
    products,
    reference,
)

from .made_up_cores import table
from .test_cpu import agree, arguments, check_linear, make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has asked for no table yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QSEARCH_PRODUCTS", raising=False)
    products.forget()
    yield tmp_path
    products.forget()


def test_the_fastest_way_of_each_range_of_rows_is_taken() -> None:
    made = table()
    seconds = {
        **made.seconds,
        "wide": {
            "int_mm": (4.0, 1.0, 4.0, 4.0, 4.0, 4.0, 1.0),
            "fp32": (2.0, 2.0, 2.0, 5.0, 2.0, 2.0, 2.0),
        },
    }

    with products.using(made._replace(seconds=seconds)):
        found = {rows: products.way("wide", rows) for rows in (1, 2, 16, 17, 128, 129, 512, 10**6)}
        small = {rows: products.way("wide", rows, weights=9) for rows in (2, 128, 129, 512, 10**6)}

    assert small == {2: "int_mm", 128: "fp32", 129: "fp32", 512: "fp32", 10**6: "int_mm"}

    assert found == {
        1: "fp32",
        2: "int_mm",
        16: "int_mm",
        17: "fp32",
        128: "fp32",
        129: "int_mm",
        512: "int_mm",
        10**6: "fp32",
    }


def test_bf16_without_units_is_computed_in_fp32_and_handed_back() -> None:
    x, weight = torch.randn(30, 24).bfloat16(), torch.randn(5, 24).bfloat16()

    with products.using(table(keep_bf16="fp32", W8_bf16="fp32")):
        assert products.float_type(torch.bfloat16) == torch.float32
        assert products.float_type(torch.float32) == torch.float32
        made, bytes_ = products.dense_linear(x, weight), ops.linear(x, make(5, 24, 8))
    with products.using(table(keep_bf16="bf16")):
        assert products.float_type(torch.bfloat16) == torch.bfloat16

    right = F.linear(x.float(), weight.float()).bfloat16()
    assert made.dtype == bytes_.dtype == torch.bfloat16
    torch.testing.assert_close(made, right, rtol=2**-8, atol=0)


def test_a_compiler_writes_int_mm_into_its_graph_only_where_it_is_exact_and_fastest() -> None:
    with products.using(table(wide="int_mm")):
        assert products.fused_int_mm()
    for other in (
        table(wide="fp32"),
        table(exact="pairs", wide="int_mm + rest"),
        table(unsigned=False, wide="int_mm"),
    ):
        with products.using(other):
            assert not products.fused_int_mm()


def test_a_compiled_layer_on_a_core_without_int_mm_computes_the_same() -> None:
    weight, x = make(6, 64, 8), torch.randn(40, 64)

    with torch.no_grad(), products.using(table(wide="fp32")):
        compiled = torch.compile(
            lambda x: ops.linear_rounded(x, weight, None, 8), backend="aot_eager", fullgraph=True
        )
        made = compiled(x)
    torch._dynamo.reset()

    agree(made, reference.linear_wnaxi(x, **arguments(weight), activation=8), torch.float32)  # type: ignore[arg-type]


def test_the_table_is_timed_once_and_read_from_disk_after(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(product_timing, "timed", lambda: asked.append(1) or table(wide="fp32"))

    assert products.way("wide", 300) == "fp32"
    products.forget()
    assert products.way("wide", 300) == "fp32"

    assert len(asked) == 1
    [file] = (cache / "qsearch").iterdir()
    assert json.loads(file.read_text())["made on"] == product_table.core()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"made on": {"core": "another"}}', "no rows"], ids=str
)
def test_a_broken_table_and_one_of_another_core_are_made_again(
    content: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    made = table()._replace(
        seconds={"wide": {"int_mm": (1.0, math.inf, 2.0, math.inf, 3.0, 1.0, 2.0)}}
    )

    product_table.keep(made)

    assert product_table.load() == made


def test_another_torch_thread_count_or_cap_is_another_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {product_table.path()}
    for name, value in (("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ATEN_CPU_CAPABILITY", "avx2")):
        monkeypatch.setenv(name, value)
        known.add(product_table.path())
    monkeypatch.setattr(torch, "__version__", "9.9")
    known.add(product_table.path())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    known.add(product_table.path())

    assert len(known) == 5


def test_a_cache_that_can_not_be_written_costs_nothing_but_the_time(
    blocked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_core_that_torch_does_not_know_has_a_table_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)

    assert product_table.core()["core"]


def test_the_plain_twins_serve_everything_where_they_are_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QSEARCH_PRODUCTS", "reference")
    monkeypatch.setattr(torch, "_int_mm", None)
    weight, x = make(6, 36, 8), torch.randn(5, 36)
    places = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    picture = torch.randn(2, 4, 5, 5)

    assert torch.equal(ops.linear(x, weight), reference.linear_wna16(x, **arguments(weight)))  # type: ignore[arg-type]
    assert torch.equal(
        ops.linear_rounded(x, weight, None, 8),
        reference.linear_wnaxi(x, **arguments(weight), activation=8),
    )  # type: ignore[arg-type]
    assert torch.equal(
        ops.conv2d_rounded(picture, weight, None, 8, **places),
        reference.conv2d_wnaxi(picture, **arguments(weight), activation=8, **places),  # type: ignore[arg-type]
    )
    assert not products.fused_int_mm()


def test_one_integer_product_can_be_forced_and_another_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(
        product_timing, "timed", lambda: table(exact="pairs", wide="fp32", narrow="fp32")
    )
    monkeypatch.setenv("QSEARCH_PRODUCTS", "onednn")
    assert (products.way("wide", 40), products.way("narrow", 40)) == ("onednn + rest", "onednn")

    monkeypatch.setenv("QSEARCH_PRODUCTS", "avx")
    with pytest.raises(
        ValueError, match="one of reference, int_mm, onednn, madd, fp32 on this core; given 'avx'"
    ):
        products.way("wide", 40)


def test_every_scheme_says_what_serves_it_and_what_it_is_worth() -> None:
    made = table(
        exact="pairs", wide="onednn + rest", narrow="int_mm", W8A8_fp32="rounded", keep_bf16="fp32"
    )
    with products.using(made):
        rows = {(r["scheme"], r["inputs"], r["rows"]): r for r in products.describe()}

        assert rows["W8A8", "fp32", 256]["product"] == "onednn + rest"
        assert rows["W8A8", "fp32", 256]["x fp32"] == pytest.approx(10)
        assert rows["W4A8", "bf16", 1]["product"] == "int_mm"
        assert rows["W4 groups", "fp32", 8]["x fp32"] == pytest.approx(1)


@pytest.mark.slow
def test_two_processes_that_ask_at_once_end_with_one_whole_table(cache: Path) -> None:
    ask = "from qsearch_kernels import products; print(products.way('wide', 300))"
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    asking = [
        subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, env=alone)
        for _ in range(2)
    ]

    said = [process.communicate(timeout=120)[0].strip() for process in asking]

    assert [process.returncode for process in asking] == [0, 0]
    [file] = (cache / "qsearch").iterdir()
    wide = json.loads(file.read_text())["seconds"]["wide"]
    assert set(said) <= set(wide)


@pytest.mark.parametrize(
    ("bits", "group", "activation", "kind"),
    [
        (8, 0, 8, "W8A8"),
        (8, 0, 7, "W8A7"),
        (4, 0, 8, "W4A8"),
        (8, 0, None, "W8"),
        (3, 0, None, "W4"),
        (4, 8, None, "W4 groups"),
    ],
)
def test_a_packed_weight_is_of_one_kind(
    bits: int, group: int, activation: int | None, kind: str
) -> None:
    assert products.kind_of(make(6, 64, bits, group=group), activation) == kind


def test_this_core_has_a_whole_table() -> None:
    known = product_timing.timed()

    assert known.exact["fp32"] == "all"
    assert {kind.rpartition(" ")[0] for kind in known.seconds} - {"", "keep"} == set(
        products.SCHEMES
    )
    for ways in known.seconds.values():
        for place in range(len(product_table.SHAPES)):
            assert math.isfinite(min(times[place] for times in ways.values()))


def test_weights_for_timing_are_those_of_a_layer() -> None:
    for bits, group in ((8, 0), (4, 0), (4, 64), (4, 48)):
        weight = bench.random_weight(20, 128, bits, group=group)
        values = weight.dequantize(torch.float32)

        assert cpu.linear(torch.randn(3, 128), weight, None).shape == (3, 20)
        assert float(values.abs().max()) == pytest.approx(
            float(weight.scale.max()) * (2 ** (bits - 1) - 1), rel=0.5
        )
        assert float(values.std()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_bf16_rows_times_bytes_about_zero_by_torchs_own_product(rows: int) -> None:
    w, bias = make(64, 96, 8), torch.randn(64)
    x = torch.randn(rows, 96).bfloat16()

    with products.using(table(W8_bf16="int8pack")):
        assert cpu.weight_way(w, rows, torch.bfloat16) == "int8pack"
        assert (
            cpu.weight_way(make(64, 95, 8), rows, torch.bfloat16) != "int8pack"
        )  # it would read beyond
        assert cpu.weight_way(make(64, 96, 8, zero=True), rows, torch.bfloat16) != "int8pack"
        check_linear(x, w, bias)
