"""Stated errors of shares cover the truth as often as they should, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qsearch.core.probe_responses import ProbeResponses

CELL = ("noise", 0)
#: within one and two standard errors of a normal number, and how far from that an honest error may
#: be
ONE, TWO, OFF = 0.683, 0.954, 0.05


def coverage(
    values: NDArray[np.float64], power: NDArray[np.float64], truth: float
) -> tuple[float, float]:
    """How often, over the first axis of `values` [rounds, probes, parts], the truth lies within one
    and within two stated errors.
    """
    shares = ProbeResponses(
        tuple((f"l{i}", "s") for i in range(len(values))),
        {CELL: values[:, None].astype(np.float32)},
        {CELL: power},
    )
    found = np.array([shares.error(CELL, [i]) for i in range(len(values))])
    off = np.abs(np.log(found[:, 0] / truth)) / (found[:, 1] / found[:, 0])
    return float(np.mean(off < 1)), float(np.mean(off < 2))


@pytest.mark.parametrize(
    ("probes", "spread"), [(8, [1.0]), (24, [1.0]), (24, [1.0, 1.0]), (12, [1.0, 4.0, 0.2])]
)
def test_errors_cover_the_truth_for_any_number_of_probes_and_unequal_parts(
    probes: int, spread: list[float]
) -> None:
    dice, size = np.random.default_rng(0), np.array(spread)
    values = dice.normal(size=(3000, probes, len(spread))) * np.sqrt(size)

    one, two = coverage(values, np.ones(len(spread)), float(size.mean()))

    assert one == pytest.approx(ONE, abs=OFF)
    assert two == pytest.approx(TWO, abs=OFF)


@pytest.mark.parametrize("parts", [4, 8])
def test_errors_cover_the_truth_where_samples_differ(parts: int) -> None:
    dice = np.random.default_rng(1)
    size = dice.gamma(2.0, 0.5, size=(3000, 1, parts))  # samples whose errors are 1 on average
    values = dice.normal(size=(3000, 16, parts)) * np.sqrt(size)

    one, two = coverage(values, np.ones(parts), 1.0)

    assert one == pytest.approx(ONE, abs=0.07)
    assert two == pytest.approx(TWO, abs=0.07)


def test_errors_are_not_too_small_where_few_entries_of_the_output_move() -> None:
    dice = np.random.default_rng(2)
    moved = np.array([1.0, 0.7, 0.5, 0.3])
    values = (
        dice.integers(0, 2, size=(3000, 24, 1, 4)) * 2 - 1
    ) @ moved  # signs times what four entries moved by: no normal number yet

    one, two = coverage(values, np.ones(1), float(moved @ moved))

    assert one > ONE - OFF
    assert two > TWO - OFF


def test_what_moves_nothing_has_no_error() -> None:
    shares = ProbeResponses(
        (("a", "s"),), {CELL: np.zeros((1, 1, 8, 2), np.float32)}, {CELL: np.ones(2)}
    )

    assert shares.error(CELL, [0]) == (0.0, 0.0)
