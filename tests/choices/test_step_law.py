"""The step law: a bit more halves the step, so noise falls by about 6 dB a bit; what the min-max
quantizer does on Gaussian weights.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qsearch.choices.quantization import quantize
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure.noise import relative_noise
from qsearch.measure.simulation import simulate
from qsearch.testing import assert_step_law

WEIGHTS = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))


def sqnr(scheme: str) -> float:
    """dB of signal over quantization noise on Gaussian weights."""
    return -10 * math.log10(
        relative_noise(quantize(WEIGHTS, Scheme.parse(scheme)).dequantize(), WEIGHTS)[0]
    )


def law(few: int, many: int, family: str) -> float:
    """Gain in dB if noise is a twelfth of the squared step, the step being the range over its
    number of steps.
    """
    steps = [2**b - 1 if family == "uint" else 2**b - 2 for b in (few, many)]
    return 20 * math.log10(steps[1] / steps[0])


#: dB; 131,072 weights in 256 channels: over seeds the gains below vary by less than half of this
TOLERANCE = 0.1


@pytest.mark.parametrize("granularity", ["c", "g64"])
@pytest.mark.parametrize(("few", "many", "about"), [(2, 4, 14.0), (4, 8, 24.6)])
def test_from_2_to_4_bits_are_14_db_and_from_4_to_8_bits_24_6(
    few: int, many: int, about: float, granularity: str
) -> None:
    gain = sqnr(f"uint{many}-{granularity}") - sqnr(f"uint{few}-{granularity}")

    assert law(few, many, "uint") == pytest.approx(about, abs=0.05)
    assert gain == pytest.approx(law(few, many, "uint"), abs=TOLERANCE)


@pytest.mark.parametrize(
    "scheme", ["uint3-c", "uint4-c", "uint8-c", "uint4-g64", "int4-c", "int8-c"]
)
def test_the_noise_is_a_twelfth_of_the_squared_step(scheme: str) -> None:
    made = quantize(WEIGHTS, Scheme.parse(scheme))

    expected = -10 * math.log10(
        float(made.code.scale.double().square().mean() / 12 / WEIGHTS.double().square().mean())
    )
    assert sqnr(scheme) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("few", "many"), [(4, 6), (6, 8), (4, 8)])
def test_symmetric_codes_follow_the_law_from_4_bits_on(few: int, many: int) -> None:
    assert sqnr(f"int{many}-c") - sqnr(f"int{few}-c") == pytest.approx(
        law(few, many, "int"), abs=TOLERANCE
    )


@pytest.mark.parametrize(("scheme", "excess"), [("int2-c", 1.0), ("int2-t", 1.0), ("uint2-t", 0.4)])
def test_steps_wider_than_the_spread_of_the_weights_make_less_noise_than_the_law_says(
    scheme: str, excess: float
) -> None:
    # Most weights round to zero there, which costs their own size and not a random part of a step:
    # law and measurement must differ.
    made = quantize(WEIGHTS, Scheme.parse(scheme))
    assert float(made.code.scale.mean()) > 1.3  # standard deviations

    expected = -10 * math.log10(
        float(made.code.scale.double().square().mean() / 12 / WEIGHTS.double().square().mean())
    )
    assert sqnr(scheme) > expected + excess


def test_smaller_groups_make_less_noise_at_the_same_bits() -> None:
    levels = [sqnr(f"uint4-{granularity}") for granularity in ("t", "c", "g128", "g32", "g8")]

    assert levels == sorted(levels)
    assert len(set(levels)) == len(levels)


def simulated(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The weight that `simulate` computes with."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    model = nn.Sequential(layer)
    graph = extract(model, {"input": torch.zeros(1, weight.shape[1])})
    with simulate(model, {"0": scheme}, graph):
        return layer.weight.detach().clone()


def test_simulate_passes_the_guard() -> None:
    assert_step_law(simulated)


def test_a_runner_that_clips_an_eight_bit_grid_fails_the_guard() -> None:
    # MixDQ's sensitivity scripts load the step of 8 bits and change the number of levels alone.
    def clipped(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        step = quantize(weight, Scheme.parse("int8-c")).code.scale[:, 0]
        levels = 2 ** (scheme.bits - 1)
        return step * (weight / step).round().clamp(-levels, levels - 1)

    with pytest.raises(AssertionError, match=r"2 to 4 bits gain .* dB and not 13\.98"):
        assert_step_law(clipped)


def test_a_runner_that_forgets_to_change_the_bits_fails_the_guard() -> None:
    with pytest.raises(AssertionError, match=r"2 to 4 bits gain 0\.00 dB"):
        assert_step_law(
            lambda weight, scheme: quantize(weight, Scheme.parse("uint4-c")).dequantize()
        )
