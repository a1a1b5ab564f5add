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
from ...core.shares import ratio
from ...core.table import SensitivityTable
from ..gradients import Contraction
from ..question import Answer, Question

needs_calls = True


def plan(question: Question) -> str:
    """Passes and memory."""
    passes = sum(o.sampler_steps for o in question.observations) * (
        1 + 2 * question.probes * len(question.metrics)
    )
    return (
        f"{passes:,} denoiser passes (a backward counts two) for all choices at once; "
        f"{Contraction(question).memory}"
    )


def estimate(question: Question, earlier: SensitivityTable | None) -> Iterator[Answer]:
    """An answer after every observation; a killed call goes on after the last whole step bin. Steps
    of a trajectory are added as if independent.
    """
    contraction = Contraction(question, squared=True)
    rows: list[dict[str, Any]] = []
    if earlier is not None:
        rows = [{str(k): v for k, v in row.items()} for row in earlier.frame.to_dict("records")]
    done = {int(r["step"]) for r in rows}
    _, count = question.floors, 0

    def table() -> SensitivityTable:
        return SensitivityTable.from_rows(question.graph.id, rows)

    with contraction.watching():
        for step, parts in question.bins.items():
            if step in done:
                count += len(parts)
                yield Answer(count, len(question.observations), table)
                continue
            found = {
                metric: np.empty((len(contraction.choices), question.probes, len(parts)))
                for metric in question.metrics
            }
            power = {metric: np.empty(len(parts)) for metric in question.metrics}
            for i, observation in enumerate(parts):
                scale, features = observation.scale, observation.features()
                for metric, made in features.items():
                    power[metric][i] = float(scale[metric].sum())
                    seeds = [
                        int(digest([question.seed, metric, step, i, k]), 16) % 2**63
                        for k in range(question.probes)
                    ]
                    found[metric][:, :, i] = (
                        contraction.of(
                            made, seeds, observation, retain=metric != question.metrics[-1]
                        )
                        .sum(1)
                        .T
                    )
                if i < len(parts) - 1:
                    count += 1
                    yield Answer(count, len(question.observations), table)
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
                        "floor": question.floor(site, metric, step),
                    }
                    rows.append(row | {"estimator": "fisher", "seed": question.seed})
            count += 1
            yield Answer(count, len(question.observations), table)
