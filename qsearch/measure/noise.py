"""Relative noise power of an output, with the error bar of a ratio of means."""

from __future__ import annotations

from torch import Tensor

from ..core.errors import QSearchError


def relative_noise(output: Tensor, reference: Tensor) -> tuple[float, float]:
    """(sum of squared differences / sum of squares, its standard error over the samples) of two [N,
    ...] tensors.

    Raises `QSearchError` for a reference of zeros.
    """
    return ratio(*_powers(output, reference))


def noise_by_sample(output: Tensor, reference: Tensor) -> Tensor:
    """Sum of squared differences of each sample [N] over the samples' mean sum of squares; their
    mean is `relative_noise`.

    Raises `QSearchError` for a reference of zeros.
    """
    error, power = _powers(output, reference)
    return error / power.mean()


def _powers(output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    error = (output - reference).double().flatten(1).square().sum(1)
    power = reference.double().flatten(1).square().sum(1)
    if not power.any():
        raise QSearchError(
            "noise is measured relative to the output; the reference output is all "
            "zeros, is the model trained?"
        )
    return error, power


def ratio(error: Tensor, power: Tensor) -> tuple[float, float]:
    """(sum of `error` [N] / sum of `power` [N], its standard error): that of a ratio estimator over
    N samples, infinite for one.
    """
    value = float(error.sum() / power.sum())
    n = len(error)
    if n < 2:
        return value, float("inf")
    spread = (error - value * power).square().sum() / (n * (n - 1))
    return value, float(spread.sqrt() / power.mean())
