"""Small floats: every value by hand, torch's own eight-bit types byte by byte, and FP4DiT's formula
with its real-valued bias.
"""

from __future__ import annotations

import math

import pytest
import torch

from qsearch.choices.floats import FloatFormat
from qsearch.choices.quantization import quantize
from qsearch.core.scheme import Scheme

FORMATS = ["e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e3m4", "e4m3", "e5m2"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),  # OCP
        ("e1m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),  # evenly spaced: symmetric integers
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),  # powers of two
    ],
)
def test_the_values_of_four_bit_formats_are_these(name: str, values: list[float]) -> None:
    assert FloatFormat.named(name).values().tolist() == values + [-v for v in values]


@pytest.mark.parametrize(
    ("name", "top"), [("e2m1", 6), ("e2m3", 7.5), ("e3m2", 28), ("e4m3", 448), ("e5m2", 57344)]
)
def test_the_largest_values_are_those_of_ocp(name: str, top: float) -> None:
    assert FloatFormat.named(name).top == top


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_keeps_its_code(name: str) -> None:
    form = FloatFormat.named(name)
    values = form.values()
    codes = torch.arange(len(values))[~values.isnan()]

    found = form.encode(values[codes])

    assert (
        found[codes != 2 ** (form.bits - 1)].tolist()
        == codes[codes != 2 ** (form.bits - 1)].tolist()
    )
    assert int(form.encode(torch.tensor([-0.0]))) == 0  # zero has one code


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_eight_bit_codes_are_torch_s_bytes(name: str, dtype: torch.dtype) -> None:
    form = FloatFormat.named(name)
    numbers = torch.cat(
        [torch.randn(20_000) * size for size in (1e-6, 1e-3, 0.1, 1.0, 30.0, 300.0, 1e5)]
    )

    theirs = numbers.clamp(-form.top, form.top).to(dtype).view(torch.uint8)

    ours = form.encode(numbers)
    assert torch.equal(ours, torch.where(theirs == 128, 0, theirs))  # 128 is minus zero


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_goes_to_a_nearest_value(name: str) -> None:
    form = FloatFormat.named(name)
    values = form.values()
    numbers = torch.cat([torch.randn(2000) * form.top * size for size in (1e-4, 1e-2, 0.3, 1.0)])

    found = values[form.encode(numbers).int()]

    least = (numbers[:, None] - values[~values.isnan()]).abs().amin(1)
    torch.testing.assert_close((found - numbers).abs(), least, rtol=1e-6, atol=0)


def fp4dit(x: float, clip: float, exponent: int, mantissa: int) -> float:
    """FP4DiT's quantizer as its section 3.1 writes it: a real-valued exponent bias set by the clip
    value.
    """
    bias = 2**exponent - math.log2(clip) + math.log2(2 - 2.0**-mantissa) - 1
    kept = min(max(x, -clip), clip)
    binade = max(math.floor(math.log2(abs(kept)) + bias), 1) if kept else 1
    step = 2.0 ** (binade - mantissa - bias)
    return step * round(kept / step)


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "e2m3", "e3m2"])
def test_a_scale_of_its_own_is_fp4dit_s_real_valued_bias(name: str) -> None:
    weights = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    scheme = Scheme.parse(f"{name}-g16")
    made = quantize(weights, scheme)

    back = made.dequantize()

    clips = (
        made.code.scale[..., 0] * FloatFormat.named(scheme.format).own_top
    ).tolist()  # the largest weight, as fp16 stores the scale
    for r in range(3):
        for c in range(64):
            expected = fp4dit(float(weights[r, c]), clips[r][c // 16], int(name[1]), int(name[3]))
            assert float(back[r, c]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_e1m2_is_the_symmetric_integer_of_four_bits() -> None:
    weights = torch.randn(8, 96, generator=torch.Generator().manual_seed(6))

    torch.testing.assert_close(
        quantize(weights, Scheme.parse("e1m2-g32")).dequantize(),
        quantize(weights, Scheme.parse("int4-g32")).dequantize(),
        rtol=2e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_wide_formats_follow_weights_of_any_size(size: float) -> None:
    weights = torch.randn(4, 256, generator=torch.Generator().manual_seed(7)) * size

    error = (
        quantize(weights, Scheme.parse("e5m2-c")).dequantize() - weights
    ).square().sum() / weights.square().sum()

    assert float(error) < 0.01
