"""Quantized: shapes and groups of every raggedness, and a slow twin that says which number each
code must be.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qsearch.choices.quantization import from_groups, quantize, to_groups
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme

Array = NDArray[np.float32]
#: shape and axis of the output channels: rows that groups divide or not, one row, one column,
#: convolutions, transposed convolutions
WEIGHTS = [
    ((6, 40), 0),
    ((5, 7), 0),
    ((5, 7), 1),
    ((1, 9), 0),
    ((7, 1), 0),
    ((1, 1), 0),
    ((4, 6, 3, 3), 0),
    ((4, 6, 3, 3), 1),
    ((3, 4, 5), 1),
    ((2, 3, 2, 1, 3), 0),
]
GRANULARITIES = ["t", "c", "g1", "g8", "g16", "g1000"]


def weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "axis"), WEIGHTS, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_cutting_into_groups_and_back_changes_nothing(
    shape: tuple[int, ...], axis: int, granularity: str
) -> None:
    w = weight(shape)

    assert torch.equal(
        from_groups(to_groups(w, Scheme.parse(f"int4-{granularity}"), axis), shape, axis), w
    )


@pytest.mark.parametrize(("shape", "axis"), WEIGHTS, ids=str)
@pytest.mark.parametrize("form", ["int4", "uint3"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_is_made_takes_the_bits_that_the_plan_is_charged(
    shape: tuple[int, ...], axis: int, form: str, granularity: str
) -> None:
    scheme = Scheme.parse(f"{form}-{granularity}")

    made = quantize(weight(shape), scheme, axis=axis)

    assert made.code.scale.numel() == made.code.zero.numel() == scheme.groups(shape, axis)
    side = 16 * made.code.scale.numel() * (2 if scheme.family == "uint" else 1)
    assert scheme.bits * math.prod(shape) + side == scheme.stored_bits(shape, axis)


def naive_group(group: Array, scheme: Scheme) -> list[np.float32]:
    """One group, one weight after the other, by the formulas in `minmax`'s docstring."""
    top = np.float32(2**scheme.bits - 1)
    if scheme.family == "int":
        half = 2 ** (scheme.bits - 1)
        step = max(abs(w) for w in group) / np.float32(half - 1)
    else:
        low, high = min(*group, np.float32(0)), max(*group, np.float32(0))
        step = (high - low) / top
    scale = np.float32(np.float16(min(max(step, np.float32(2.0**-24)), np.float32(65504))))
    zero = (
        np.float32(half)
        if scheme.family == "int"
        else np.clip(np.round(-low / scale), np.float32(0), top)
    )
    return [scale * (np.clip(np.round(w / scale + zero), np.float32(0), top) - zero) for w in group]


def naive(w: Array, scheme: Scheme, axis: int) -> Array:
    """The slow twin of `quantize(...).dequantize()`."""
    moved = np.moveaxis(w, axis, 0)
    rows = moved.reshape(1, -1) if scheme.group == -1 else moved.reshape(len(moved), -1)
    out = np.empty_like(rows)
    size = scheme.group if scheme.group > 0 else rows.shape[1]
    for r in range(len(rows)):
        for start in range(0, rows.shape[1], size):
            group = rows[r, start : start + size]
            for i, value in enumerate(naive_group(group, scheme)):
                out[r, start + i] = value
    return np.moveaxis(out.reshape(moved.shape), 0, axis)


@pytest.mark.parametrize(("shape", "axis"), WEIGHTS, ids=str)
@pytest.mark.parametrize("form", ["int2", "int4", "int8", "uint2", "uint3", "uint8"])
@pytest.mark.parametrize("granularity", ["t", "c", "g8"])
def test_min_max_equals_its_slow_twin_exactly(
    shape: tuple[int, ...], axis: int, form: str, granularity: str
) -> None:
    scheme, w = Scheme.parse(f"{form}-{granularity}"), weight(shape, seed=3)

    made = quantize(w, scheme, axis=axis).dequantize()

    assert torch.equal(made, torch.from_numpy(naive(w.numpy(), scheme, axis).copy()))


@pytest.mark.parametrize("scheme", ["int4-c", "uint4-c", "uint2-g8", "int3-t"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e6, 1e37])
def test_the_slow_twin_agrees_on_tiny_and_huge_weights(scheme: str, size: float) -> None:
    w = (weight((5, 9), seed=4).clamp(-1, 1) * size).contiguous()

    made = quantize(w, Scheme.parse(scheme)).dequantize()

    assert torch.equal(made, torch.from_numpy(naive(w.numpy(), Scheme.parse(scheme), 0).copy()))


@pytest.mark.parametrize("scheme", ["uint4-c", "uint8-g8", "uint2-t"])
def test_zero_is_stored_exactly_by_asymmetric_codes(scheme: str) -> None:
    w = weight((6, 20)).abs() + 1  # all on one side of zero
    w[:, ::3] = 0

    made = quantize(w, Scheme.parse(scheme)).dequantize()

    assert float(made[:, ::3].abs().max()) == 0.0


def test_the_weight_comes_back_in_the_type_that_is_asked_for() -> None:
    made = quantize(weight((4, 6)).half(), Scheme.parse("int8-c"))

    assert made.dequantize(torch.float16).dtype == torch.float16
    assert made.dequantize().dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_with_the_layer_and_their_number(
    value: float,
) -> None:
    w = weight((4, 6))
    w[1, 2:4] = value

    with pytest.raises(
        QSearchError,
        match=r"weights must be finite to be quantized; blocks\.3\.to_q holds 2 that are not",
    ):
        quantize(w, Scheme.parse("int4-c"), layer="blocks.3.to_q")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("keep", "out is kept in full precision; there is nothing to quantize"),
        (
            "km4-c@minmax",
            r"minmax can't make km4 \(out, scheme km4-c@minmax\); see `qsearch list quantizers`",
        ),
        ("int4-c@minmaxx", r"no plug-in 'minmaxx' among the quantizers; did you mean 'minmax'\?"),
    ],
)
def test_what_can_t_be_carried_out_is_refused_by_name(scheme: str, message: str) -> None:
    with pytest.raises(QSearchError, match=message):
        quantize(weight((4, 6)), Scheme.parse(scheme), layer="out")
