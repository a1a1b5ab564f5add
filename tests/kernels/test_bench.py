"""The stopwatch's contenders: each is a product of the shape it is timed for, and the time that
none beats counts the bytes and operations of its kind.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch

from qsearch_kernels import bench

RATES = {"int8": 4e12, "float": 1e12, "bytes": 1e9}


def shapes(device: str) -> dict[str, object]:
    with torch.no_grad():
        return {
            name: getattr(call(), "shape", None)
            for name, call in bench.contenders(32, 128, 64, device).items()
        }


def test_every_contender_is_a_product_of_its_shape() -> None:
    found = shapes("cpu")

    assert {"fp32", "bf16", "W8A8", "W4A8", "W4 g64, fp32 in"} <= set(found)
    assert found == dict.fromkeys(found, (32, 64))


@pytest.mark.gpu
def test_every_contender_on_a_gpu_is_a_product_of_its_shape_and_rounded_inputs_are_among_them() -> (
    None
):
    found = shapes("cuda")

    assert {
        "fp32",
        "bf16",
        "W8A8",
        "W8A8, bf16 in",
        "W4A8",
        "W4A8, bf16 in",
        "W4A8 g64, bf16 in",
        "W4 g64, bf16 in",
    } <= set(found)
    assert found == dict.fromkeys(found, (32, 64))


def test_gemlite_is_left_alone_where_there_is_no_gpu_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trap = types.ModuleType("gemlite")
    trap.__spec__ = ModuleSpec("gemlite", None)
    monkeypatch.setitem(sys.modules, "gemlite", trap)  # importing gemlite.helper of it would fail

    assert not [name for name in bench.contenders(2, 64, 3) if "gemlite" in name]


@pytest.mark.parametrize(
    ("name", "weight", "entry", "rate"),
    [
        ("fp32", 32, 4, "float"),
        ("bf16 compiled", 16, 2, "float"),
        ("W8A8", 8, 4, "int8"),
        ("W4A8, bf16 in", 4, 2, "int8"),
        ("W4A8 g64, bf16 in", 4.25, 2, "int8"),
        ("W4 g64, fp32 in", 4.25, 4, "float"),
        ("torchao W8, bf16 in, compiled", 8, 2, "float"),
        ("gemlite W8A8, bf16 in", 8, 2, "int8"),
        ("gemlite W4 g64, bf16 in", 4.25, 2, "float"),
    ],
)
def test_the_floor_is_the_slower_of_bytes_and_operations(
    name: str, weight: float, entry: int, rate: str
) -> None:
    assert bench.floor(name, 1, 100, 200, RATES) == pytest.approx(
        (100 * 200 * weight / 8 + entry * 300) / RATES["bytes"]
    )
    assert bench.floor(name, 10**6, 100, 200, {**RATES, "bytes": 1e18}) == pytest.approx(
        2 * 10**6 * 100 * 200 / RATES[rate]
    )


def test_a_contender_that_is_many_times_slower_is_called_in_one_round_alone() -> None:
    called = {"fast": 0, "slow": 0, "hopeless": 0}
    now = 0.0

    def by(name: str, taken: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            called[name] += 1
            now += taken

        return call

    given = {"hopeless": by("hopeless", 9.0), "fast": by("fast", 1.0), "slow": by("slow", 7.0)}

    taken = bench.race(given, 0.0, clock=lambda: now)

    assert taken == {"hopeless": [9.0], "fast": [1.0] * 5, "slow": [7.0] * 5}
    assert called == {"hopeless": 2, "fast": 6, "slow": 6}  # one is not counted
