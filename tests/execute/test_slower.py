"""Packed layers that this CPU computes slower than full precision are named, with a remedy."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from qsearch.core.graph import LayerSpec
from qsearch.core.scheme import Scheme
from qsearch.execute.layers import QuantLayer
from qsearch.execute.slower import SlowerWarning, slower_schemes, warn_of_slower
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
        found = slower_schemes(layers)

    assert found == {"int4-g32": pytest.approx(10), "e2m1-g32+a8": pytest.approx(10)}


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
