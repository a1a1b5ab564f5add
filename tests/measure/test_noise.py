"""Relative noise: numbers by hand, and an error bar that covers the truth as often as it says."""

from __future__ import annotations

import math

import pytest
import torch

from qsearch.core.errors import QSearchError
from qsearch.measure.noise import relative_noise


def test_identical_outputs_have_no_noise() -> None:
    y = torch.randn(4, 3, 2)

    assert relative_noise(y, y) == (0.0, 0.0)


def test_noise_is_squared_error_over_squared_output() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # powers 25 and 25
    output = torch.tensor([[3.0, 5.0], [2.0, 5.0]])  # errors 1 and 4

    value, error = relative_noise(output, reference)

    assert value == pytest.approx(5 / 50)
    # Equal powers: the standard error of the mean of 1/25 and 4/25.
    assert error == pytest.approx(torch.tensor([1 / 25, 4 / 25]).std().item() / math.sqrt(2))


def test_samples_with_more_power_weigh_more() -> None:
    reference = torch.tensor([[1.0], [10.0]])

    assert relative_noise(reference + 1, reference)[0] == pytest.approx(2 / 101)


def test_one_sample_has_an_unknown_error() -> None:
    assert relative_noise(torch.ones(1, 5) * 1.1, torch.ones(1, 5)) == (
        pytest.approx(0.01, rel=1e-5),
        math.inf,
    )


def test_noise_does_not_depend_on_the_size_of_the_output() -> None:
    reference, change = torch.randn(6, 10), torch.randn(6, 10)

    assert relative_noise((reference + change) * 1e6, reference * 1e6)[0] == pytest.approx(
        relative_noise(reference + change, reference)[0], rel=1e-5
    )


def test_an_output_of_nothing_is_refused() -> None:
    with pytest.raises(QSearchError, match="the reference output is all zeros"):
        relative_noise(torch.ones(2, 3), torch.zeros(2, 3))


def test_nearly_all_error_bars_hold_the_truth() -> None:
    # Error and power of a sample both vary, as they do over prompts; the true ratio is E[error] /
    # E[power].
    dice, inside, rounds = torch.Generator().manual_seed(0), 0, 400
    for _ in range(rounds):
        size = 1 + torch.rand(32, 1, generator=dice)
        reference = size * torch.randn(32, 64, generator=dice)
        value, error = relative_noise(
            reference + 0.3 * torch.randn(32, 64, generator=dice), reference
        )
        inside += abs(value - 0.09 / (7 / 3)) < 2 * error

    # Two standard errors: 95% for a normal ratio; the tolerance is three deviations of a count of
    # 400 and the skew at 32 samples.
    assert inside / rounds == pytest.approx(0.95, abs=0.04)
