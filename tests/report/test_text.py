"""Tables for a terminal of any width: no lone arrows, no broken names, titles in full."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qsearch.report.text import listed, plain, results


def lines_of(shown: RenderableType, width: int) -> list[str]:
    """What a terminal of that width shows."""
    console = Console(file=StringIO(), width=width)
    console.print(shown)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def rows() -> list[dict[str, Any]]:
    metrics = {"output_sqnr": [26.01, 0.2], "sqnr": [18.6, 0.45], "ssim": [0.971, 0.006]}
    plans = ("full precision", "uniform uint4-c", "plan", "random")
    return [
        {"plan": name, "average_bits": 4.0, "bytes": 762_000, "metrics": metrics} for name in plans
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_results_say_sizes_and_no_arrow_stands_alone(width: int) -> None:
    lines = lines_of(results(rows()), width)

    assert max(map(len, lines)) <= width
    assert [line for line in lines if line.strip() in ("↑", "↓")] == []
    [size] = [line for line in lines if line.split()[:1] == ["size"]]
    assert size.count("762 kB") == 4 or width < 80


def test_a_title_that_is_wider_than_its_table_stays_in_one_line() -> None:
    title = "schemes of gguf; for layers of common sizes; bits: stored bits a weight"

    assert lines_of(plain([{"scheme": "int4-g32", "bits": 4.5}], title), 80)[0] == title


def test_captions_go_on_below_themselves_and_no_name_is_broken() -> None:
    words = "a safetensors file in its layouts, a marker beside every quantized weight"

    lines = lines_of(listed([("comfyui", words), ("compressed_tensors", words)]), 60)

    assert max(map(len, lines)) <= 60
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        "comfyui",
        "compressed_tensors",
    ]
    assert " ".join(" ".join(lines).split()).count(words) == 2


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_number_is_broken_at_any_width(width: int) -> None:
    times = {"keep": 0.05226, "uint2-c": 0.521, "uint4-c": 0.3201, "uint8-c": 12.4312}
    rows = [{"layer": "Conv2d", "weight": "16x24x3x3", "input": "2x24x8x8", "calls": 1, **times}]

    lines = lines_of(plain(rows, "ms a call"), width)

    assert max(map(len, lines)) <= width
    for text in ("0.05226", "0.3201", "12.43", "16x24x3x3", "Conv2d"):
        assert [line for line in lines if text in line] != [], text
