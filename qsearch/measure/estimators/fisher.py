"""Squared gradients times squared weight errors: the diagonal of the Gauss-Newton matrix, as
mixed-precision tools do it; a baseline.

The loss is half the squared error of the output against targets drawn around the model's own output
(so its Fisher information is J^T J); its gradients are those of the probes. ModelOpt and AutoRound
take the gradients of a training loss on labelled data instead, which here nobody has. What is lost
against probes: E[sum_i g_i^2 dw_i^2] instead of E[(sum_i g_i dw_i)^2], so the weights of a layer,
and layers, are taken to err independently. Same magnitude as `noise`, same cost as probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...core.artifacts import digest
from ...core.probe_responses import ratio
from ...core.table import SensitivityTable
from ..differentiable import differentiable
from ..estimation import EstimationTask, PartialResult
from ..gradients import Contraction

needs_calls = True


def plan(task: EstimationTask) -> str:
    """Passes and memory."""
    passes = sum(o.sampler_steps for o in task.observations) * (
        1 + 2 * task.probes * len(task.metrics)
    )
    return (
        f"{passes:,} denoiser passes (a backward counts two) for all choices at once; "
        f"{Contraction(task).memory}"
    )


def estimate(task: EstimationTask, earlier: SensitivityTable | None) -> Iterator[PartialResult]:
    """An answer after every observation; a killed call goes on after the last whole step bin. Steps
    of a trajectory are added as if independent.
    """
    contraction = Contraction(task, squared=True)
    rows: list[dict[str, Any]] = []
    if earlier is not None:
        rows = [{str(k): v for k, v in row.items()} for row in earlier.frame.to_dict("records")]
    done = {int(r["step"]) for r in rows}
    _, count = task.floors, 0

    def table() -> SensitivityTable:
        return SensitivityTable.from_rows(task.graph.id, rows)

    with contraction.watching():
        for step, parts in task.bins.items():
            if step in done:
                count += len(parts)
                yield PartialResult(count, len(task.observations), table)
                continue
            found = {
                metric: np.empty((len(contraction.choices), task.probes, len(parts)))
                for metric in task.metrics
            }
            power = {metric: np.empty(len(parts)) for metric in task.metrics}
            for i, observation in enumerate(parts):
                with differentiable():
                    scale, features = observation.scale, observation.features()
                for metric, made in features.items():
                    power[metric][i] = float(scale[metric].sum())
                    seeds = [
                        int(digest([task.seed, metric, step, i, k]), 16) % 2**63
                        for k in range(task.probes)
                    ]
                    found[metric][:, :, i] = (
                        contraction.of(made, seeds, observation, retain=metric != task.metrics[-1])
                        .sum(1)
                        .T
                    )
                if i < len(parts) - 1:
                    count += 1
                    yield PartialResult(count, len(task.observations), table)
            for metric, squares in found.items():
                for j, (site, scheme) in enumerate(contraction.choices):
                    value, error = ratio(squares[j], power[metric])
                    row = {
                        "site": site,
                        "scheme": scheme,
                        "step": step,
                        "metric": metric,
                        "estimate": value,
                        "error": error,
                        "floor": task.floor(site, metric, step),
                    }
                    rows.append(row | {"estimator": "fisher", "seed": task.seed})
            count += 1
            yield PartialResult(count, len(task.observations), table)
