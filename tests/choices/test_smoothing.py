"""Smoothing by search: the grid of exponents, and that the search finds the least error on it."""

from __future__ import annotations

import pytest
import torch

from qsearch.choices.quantization import quantize
from qsearch.choices.smoothing import pairs, smoothed, smoothing_scale
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, 32], and inputs of which three channels in 32 are large."""
    dice = torch.Generator().manual_seed(0)
    size = torch.where(torch.arange(32) % 11 == 0, 20.0, 1.0)
    return torch.randn(48, 32, generator=dice), torch.randn(64, 32, generator=dice) * size


def rounded(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    form = Scheme.parse("int4-c")
    return quantize(rows, form).dequantize() @ quantize(weight, form).dequantize().T


def error(weight: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> float:
    truth = rows @ weight.T
    off = rounded(weight * scale, rows / scale) - truth
    return float(off.square().sum() / truth.square().sum())


def test_the_grid_is_svdquant_s_39_pairs() -> None:
    found = pairs()

    assert len(found) == len(set(found)) == 39
    assert (0.0, 0.0) in found
    assert (0.5, 0.5) in found
    assert (0.95, 0.0) in found
    assert all(beta == 0 or abs(alpha + beta - 1) < 1e-12 for alpha, beta in found)


def test_no_pair_of_the_grid_errs_less_than_the_one_that_is_found() -> None:
    weight, rows = layer()
    spans = rows.abs().amax(0), weight.abs().amax(0)

    found = smoothed(weight, rows, rounded, grid=5)

    every = [error(weight, rows, smoothing_scale(*spans, a, b)) for a, b in pairs(5)]
    assert found.error == pytest.approx(min(every), rel=1e-4)
    assert error(weight, rows, found.scale) == pytest.approx(found.error, rel=1e-4)
    assert found.error < 0.5 * every[0]  # of no smoothing
    assert pairs(5)[every.index(min(every))] == (found.alpha, found.beta)


def test_channels_that_are_never_used_are_not_blown_up() -> None:
    weight, rows = layer()
    rows[:, 3], weight[:, 5] = 0, 0

    found = smoothed(weight, rows, rounded, grid=4)

    assert bool(torch.isfinite(found.scale).all())
    assert float(found.scale.min()) > 0


def test_rows_that_are_missing_or_not_finite_are_refused() -> None:
    weight, rows = layer()

    with pytest.raises(QSearchError, match="needs finite recorded inputs; q has none"):
        smoothed(weight, rows[:0], rounded, layer="q")
    with pytest.raises(QSearchError, match="needs finite recorded inputs"):
        smoothed(weight, rows * torch.inf, rounded)
