"""Packed layers that this CPU computes slower than full precision are named, with a remedy."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from qsearch.core.graph import LayerSpec
from qsearch.core.scheme import Scheme
from qsearch.execute.layers import QuantLayer
from qsearch.execute.slower import SlowerWarning, products_here, slower_than_keep, warn_of_slower
from qsearch.race.timing import random_layer
from qsearch_kernels import products
from tests.kernels.made_up_cores import table

SCHEMES = ("int8-c+a8", "int4-g32", "e2m1-g32+a8", "keep+a8")


@pytest.fixture
def layers() -> list[tuple[str, QuantLayer]]:
    """A layer of each scheme: a product of bytes, groups, widened floats, and a kept weight."""
    spec = LayerSpec("q", "attention-q", "linear", (24, 64), 64 * 24)
    return [(s, random_layer(nn.Linear(64, 24), Scheme.parse(s), spec)) for s in SCHEMES]


def test_schemes_that_take_longer_than_full_precision_are_named_with_how_much(
    layers: list[tuple[str, QuantLayer]],
) -> None:
    slow = table(W8A8_fp32="rounded", keep_fp32="fp32")

    with products.using(slow):
        found = slower_than_keep(layers)

    assert found.schemes == {"int4-g32": pytest.approx(10), "e2m1-g32+a8": pytest.approx(10)}
    assert found.plan == pytest.approx((0.1 + 1 + 1) / 0.3)  # layers of one shape


def test_one_warning_names_them_all_and_says_what_to_do(
    layers: list[tuple[str, QuantLayer]],
) -> None:
    with products.using(table(keep_fp32="fp32")), pytest.warns(SlowerWarning) as caught:
        warn_of_slower(layers)

    [warning] = caught
    for word in ("int8-c+a8 (10.0 times)", "int4-g32", "qsearch bench", "qsearch allocate"):
        assert word in str(warning.message)


def test_nothing_is_said_where_nothing_is_slower(layers: list[tuple[str, QuantLayer]]) -> None:
    with products.using(table()), warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slower(layers, torch.bfloat16)


def test_a_plan_that_is_faster_as_a_whole_is_let_be(layers: list[tuple[str, QuantLayer]]) -> None:
    mostly = [(f"fast {i}", layers[0][1]) for i in range(200)] + [layers[1]]

    with products.using(table(W8A8_fp32="rounded")), warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slower(mostly)


def test_rows_of_a_call_are_those_of_the_graph(layers: list[tuple[str, QuantLayer]]) -> None:
    made = table(keep_fp32="fp32")
    quick = {"rounded": (0.1, 0.1, *[10.0] * 5)}  # of one and a few rows alone
    few = made._replace(seconds={**made.seconds, "W8A8 fp32": quick})
    one = [("blocks.0.layers.1", layers[0][1])]

    with products.using(few):
        assert slower_than_keep(one, rows={"blocks.0": 4}).schemes == {}
        assert slower_than_keep(one).schemes == {"int8-c+a8": pytest.approx(100)}


def test_the_plain_twins_are_asked_for_and_not_complained_of(
    layers: list[tuple[str, QuantLayer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSEARCH_PRODUCTS", "reference")

    with products.using(table(keep_fp32="fp32")):
        assert slower_than_keep(layers).schemes == {}
        assert {row["256 rows"] for row in products_here()} == {"reference"}
