"""ProbeResponses: what each choice adds to each probe (Hutchinson estimates of Jacobian-vector
products), from which the error of any plan follows by a few sums, interactions included.

A probe v is a random sign vector over what is measured (DESIGN.md §2: Hutchinson's estimator, one
gradient for all choices). s(site, choice, v) = <d(v·f)/dz, dz> is the choice's part of v·(f(plan) -
f): over probes, the mean of the squared sum of a plan's parts is the plan's squared error. Keeping
only each choice's own error would lose how errors add up or cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .steps import StepRanges

Array = NDArray[np.float64]
#: an array of responses belongs to a metric and a step bin
Cell = tuple[str, int]


@dataclass(frozen=True)
class ProbeResponses:
    """`choices`: (site, scheme) of each row. `values`: cell -> [choices, sampler steps, probes,
    parts] in fp32, NaN where nothing was measured.

    `power`: cell -> [parts], the scale of each part (of the metric `noise`, the squared output),
    NaN likewise. A part is a group of samples that share a pass and a sign vector. Within one cell
    the sampler steps belong to one trajectory: they are added before they are squared.
    """

    choices: tuple[tuple[str, str], ...]
    values: dict[Cell, NDArray[np.float32]]
    power: dict[Cell, Array]

    def has(self, metric: str) -> bool:
        """Whether probes left something of this metric."""
        return any(name == metric for name, _ in self.values)

    def of(self, cell: Cell, rows: Sequence[int]) -> Array:
        """The sum of the responses of several choices [sampler steps, probes, parts]; zeros for
        none.
        """
        found: Array = self.values[cell][list(rows)].astype(np.float64).sum(0)
        return found

    def over_ranges(self, cell: Cell, rows: Sequence[Sequence[int]], steps: StepRanges) -> Array:
        """`of` for choices that differ between ranges of steps [sampler steps, probes, parts];
        `rows`: those of each range.

        A cell of one sampler step belongs to one step bin, whose range the caller knows: its rows
        are the only ones.
        """
        values = self.values[cell]
        found = np.zeros(values.shape[1:])
        for t in range(values.shape[1]):
            mine = rows[steps.of(t, values.shape[1])]
            found[t] = values[list(mine), t].astype(np.float64).sum(0)
        return found

    def error(
        self, cell: Cell, rows: Sequence[int], summed: Array | None = None
    ) -> tuple[float, float]:
        """(relative squared error of doing all of `rows` at once, its standard error over probes
        and samples).

        `summed`: the sum of their responses, where it is no sum over `rows` (`over_ranges`).

        Errors belong to the logarithm: an interval runs from value * exp(-z error / value) to value
        * exp(z error / value).
        """
        squares = (self.of(cell, rows) if summed is None else summed).sum(0) ** 2
        return ratio(squares, self.power[cell], _normal_error(squares, self.power[cell]))

    def probe_error(self, cell: Cell, rows: Sequence[int]) -> float:
        """The standard error that is due to the probes alone: what another seed would change on the
        same samples.
        """
        return _normal_error(self.of(cell, rows).sum(0) ** 2, self.power[cell])

    def step_shares(self, cell: Cell, row: int) -> Array:
        """How much each sampler step adds to a choice's error at the end [sampler steps]: E[s_t s]
        over the scale.

        They add up to the choice's estimate; one is negative where a step undoes what the others
        did.
        """
        own = self.of(cell, [row])
        products = own * own.sum(0)
        return np.array([ratio(p, self.power[cell])[0] for p in products])


def ratio(values: Array, power: Array, probes: float | None = None) -> tuple[float, float]:
    """(sum over parts of the mean over probes of `values` [probes, parts], over the sum of `power`
    [parts]; its standard error).

    With four parts or more the error is that of a ratio of means over the parts (each has probes
    and samples of its own), or that over probes where it is larger; with fewer, that over probes:
    `probes`, or what they scatter. Infinite for one probe on fewer than four parts, NaN where
    nothing was measured.
    """
    seen = ~np.isnan(values).all(0)
    if not seen.any():
        return math.nan, math.nan
    means, scale = np.nanmean(values[:, seen], 0), power[seen]
    value, parts = float(means.sum() / scale.sum()), int(seen.sum())
    error = _scatter(values, power) if probes is None else probes
    if parts >= 4:
        # a variance from few parts is itself uncertain: Student's t with parts - 1 degrees, whose
        # tails this widens for within 10%
        widened = parts / (parts - 1) * (parts + 1) / (parts - 1)
        between = math.sqrt(widened * float(((means - value * scale) ** 2).sum())) / float(
            scale.sum()
        )
        error = between if math.isinf(error) else max(error, between)
    return value, error


def _scatter(values: Array, power: Array) -> float:
    """The standard error by how the probes scatter within each part."""
    seen = ~np.isnan(values).all(0)
    counts = (~np.isnan(values[:, seen])).sum(0)
    if not seen.any() or (counts < 2).any():
        return math.inf
    variance = np.nanvar(values[:, seen], 0, ddof=1) / counts
    return math.sqrt(float(variance.sum())) / float(power[seen].sum())


def _normal_error(squares: Array, power: Array) -> float:
    """The same for squares of sums of many random signs, which are all but normal numbers.

    The mean of n squares of normal numbers is a chi-square with n degrees of freedom, whose
    logarithm scatters by the square root of trigamma(n / 2); parts that weigh differently count for
    fewer (Satterthwaite's n). Taken from the scatter of so few squares instead, errors come out
    smallest just where the value came out too small, and cover too little.
    """
    from scipy.special import polygamma

    seen = ~np.isnan(squares).all(0)
    counts = (~np.isnan(squares[:, seen])).sum(0)
    if not seen.any() or (counts < 2).any():
        return math.inf
    means = np.nanmean(squares[:, seen], 0)
    total = float(means.sum())
    if total == 0:
        return 0.0
    degrees = total**2 / float((means**2 / counts).sum())
    return total / float(power[seen].sum()) * math.sqrt(float(polygamma(1, degrees / 2)))


def to_columns(responses: ProbeResponses | None, frame: Any) -> dict[str, list[Any]]:
    """Columns for a file, a row each of `frame`: `shares` (fp32, flattened), `power`, and
    `sampler_steps`, the first axis of `shares`.
    """
    if responses is None:
        return {}
    place = {choice: i for i, choice in enumerate(responses.choices)}
    columns: dict[str, list[Any]] = {"shares": [], "power": [], "sampler_steps": []}
    for site, scheme, metric, step in zip(
        frame["site"], frame["scheme"], frame["metric"], frame["step"], strict=True
    ):
        cell = (metric, int(step))
        values = (
            responses.values[cell][place[site, scheme]]
            if cell in responses.values
            else np.empty((0, 0), np.float32)
        )
        columns["shares"].append(values.ravel())
        columns["power"].append(responses.power.get(cell, np.empty(0)))
        columns["sampler_steps"].append(values.shape[0])
    return columns


def from_columns(frame: Any) -> ProbeResponses | None:
    """The inverse of `to_columns`, for a frame that was read from a file."""
    if "shares" not in frame.columns:
        return None
    choices = tuple(
        dict.fromkeys(zip(map(str, frame["site"]), map(str, frame["scheme"]), strict=True))
    )
    place = {choice: i for i, choice in enumerate(choices)}
    values: dict[Cell, NDArray[np.float32]] = {}
    power: dict[Cell, Array] = {}
    for row in frame[frame["sampler_steps"] > 0].to_dict("records"):
        cell = (str(row["metric"]), int(row["step"]))
        if cell not in values:
            power[cell] = np.asarray(row["power"], np.float64)
            shape = (len(choices), int(row["sampler_steps"]), -1, len(power[cell]))
            values[cell] = np.full((shape[0], len(row["shares"])), np.nan, np.float32).reshape(
                shape
            )
        values[cell][place[str(row["site"]), str(row["scheme"])]].flat = row["shares"]
    return ProbeResponses(choices, values, power)


def rows_of(responses: ProbeResponses, chosen: Mapping[str, str]) -> list[int]:
    """Rows of the choices of a plan (site -> scheme); a KeyError holds the first (site, scheme)
    that was not measured.
    """
    place = {choice: i for i, choice in enumerate(responses.choices)}
    return [place[choice] for choice in chosen.items()]
