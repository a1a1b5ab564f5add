"""Random sign vectors through the output: one backward prices every choice at every layer, and how
choices add up (Hutchinson's estimator).

To first order a choice moves the features f by J dz; for a random sign vector v, s = <d(v·f)/dz,
dz> has the mean square |J dz|^2. The cost grows with neither layers nor choices: two passes a
probe, metric and observation, and one for the forward that `ROUND` probes share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.artifacts import digest
from ...core.probe_responses import Array, Cell, ProbeResponses
from ...core.table import SensitivityTable
from ..differentiable import differentiable
from ..estimation import EstimationTask, Part, PartialResult, Round
from ..gradients import Contraction

needs_calls = True
#: probes that share a forward; all observations have theirs before the next round begins, so that
#: work that was cut short is spread evenly
ROUND = 8


def plan(task: EstimationTask) -> str:
    """Passes and memory."""
    steps = sum(o.sampler_steps for o in task.observations)
    rounds = -(-task.probes // ROUND)
    passes = steps * (rounds + 2 * task.probes * len(task.metrics))
    choices = task.count
    return (
        f"{passes:,} denoiser passes (a backward counts two) for {choices:,} choices at once; "
        f"{Contraction(task).memory}"
    )


def estimate(task: EstimationTask, earlier: SensitivityTable | None) -> Iterator[PartialResult]:
    """An answer after every round of probes of an observation. Rows as the sweep's; the standard
    error is over probes and samples.
    """
    contraction = Contraction(task)
    shares = _empty(task, contraction)
    if earlier is not None and earlier.responses is not None:
        _fill(shares, earlier.responses)
    work = rounds(task)
    _ = task.floors  # while the model is in full precision

    def table() -> SensitivityTable:
        return _table(task, shares)

    left = [part for part in work if not _known(task, shares, part)]
    found = _here(task, contraction, left)
    if task.elsewhere is not None and left:
        found = task.elsewhere(left)
    count = len(work) - len(left)
    if not left:
        yield PartialResult(count, len(work), table)
    for part, values in found:
        _place(task, shares, part, values)
        count += 1
        yield PartialResult(count, len(work), table)


def rounds(task: EstimationTask) -> list[Part]:
    """The parts of the work, rounds outermost."""
    return [
        (first, b, part)
        for first in range(0, task.probes, ROUND)
        for b, parts in task.bins.items()
        for part in range(len(parts))
    ]


def measure(task: EstimationTask, contraction: Contraction, part: Part) -> Round:
    """One round of probes of one part of a step bin, within `contraction.watching()`."""
    _, b, place = part
    observation = task.bins[b][place]
    scale = {metric: float(s.sum()) for metric, s in observation.scale.items()}
    with differentiable():
        features = observation.features()
    found: Round = {}
    for metric in task.metrics:
        words = [task.seed, metric, b, place]
        seeds = [int(digest([*words, k]), 16) % 2**63 for k in _probes(task, part)]
        shares = contraction.of(
            features[metric], seeds, observation, retain=metric != task.metrics[-1]
        )
        found[metric] = shares.transpose(2, 1, 0).astype(np.float32), scale[metric]
    return found


def _here(
    task: EstimationTask, contraction: Contraction, parts: list[Part]
) -> Iterator[tuple[Part, Round]]:
    with contraction.watching():
        for part in parts:
            yield part, measure(task, contraction, part)


def _probes(task: EstimationTask, part: Part) -> list[int]:
    return list(range(part[0], min(part[0] + ROUND, task.probes)))


def _known(task: EstimationTask, shares: ProbeResponses, part: Part) -> bool:
    _, b, place = part
    probes = _probes(task, part)
    return all(
        np.isfinite(shares.values[metric, b][:, :, probes, place]).all() for metric in task.metrics
    )


def _place(task: EstimationTask, shares: ProbeResponses, part: Part, found: Round) -> None:
    _, b, place = part
    for metric, (values, scale) in found.items():
        shares.values[metric, b][:, :, _probes(task, part), place] = values
        shares.power[metric, b][place] = scale


def _empty(task: EstimationTask, contraction: Contraction) -> ProbeResponses:
    values: dict[Cell, NDArray[np.float32]] = {}
    power: dict[Cell, Array] = {}
    for b, parts in task.bins.items():
        for metric in task.metrics:
            shape = (len(contraction.choices), parts[0].sampler_steps, task.probes, len(parts))
            values[metric, b] = np.full(shape, np.nan, np.float32)
            power[metric, b] = np.full(len(parts), np.nan)
    return ProbeResponses(contraction.choices, values, power)


def _fill(shares: ProbeResponses, earlier: ProbeResponses) -> None:
    """What was measured before; a table of other choices or another shape answers another
    question.
    """
    if earlier.choices != shares.choices:
        return
    for cell, values in earlier.values.items():
        if cell in shares.values and shares.values[cell].shape == values.shape:
            shares.values[cell][:], shares.power[cell][:] = values, earlier.power[cell]


def _table(task: EstimationTask, shares: ProbeResponses) -> SensitivityTable:
    rows: list[dict[str, Any]] = []
    for (metric, step), values in shares.values.items():
        if np.isnan(values).all():
            continue
        for i, (site, scheme) in enumerate(shares.choices):
            value, error = shares.error((metric, step), [i])
            row = {
                "site": site,
                "scheme": scheme,
                "step": step,
                "metric": metric,
                "estimate": value,
                "error": error,
                "floor": task.floor(site, metric, step),
            }
            rows.append(row | {"estimator": "probe", "seed": task.seed})
    seen = {cell for cell, values in shares.values.items() if not np.isnan(values).all()}
    found = ProbeResponses(
        shares.choices,
        {c: v for c, v in shares.values.items() if c in seen},
        {c: p for c, p in shares.power.items() if c in seen},
    )
    return SensitivityTable.from_rows(task.graph.id, rows, found)
