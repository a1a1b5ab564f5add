"""One layer at a time: change it, run the denoiser, compare. The slow twin that the fast estimators
must agree with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ...core.errors import QSearchError
from ...core.table import SensitivityTable
from ..estimation import EstimationTask, PartialResult
from ..noise import ratio
from ..simulation import simulate

needs_calls = True


def plan(task: EstimationTask) -> str:
    """One forward a choice and observation."""
    choices = task.count
    passes = choices * sum(o.sampler_steps for o in task.observations)
    return f"{passes:,} denoiser passes for {choices:,} choices, one at a time"


def estimate(task: EstimationTask, earlier: SensitivityTable | None) -> Iterator[PartialResult]:
    """An answer for every (site, scheme) that `earlier` lacks: a row a step bin and metric.

    The estimate is the squared distance of features to full precision over their scale, pooled over
    the samples of the bin; its standard error is that of a ratio of means. The floor is what the
    same forward gives when only the batch is cut differently.
    """
    graph = task.graph
    rows: list[dict[str, Any]] = []
    if earlier is not None:
        rows = [{str(k): v for k, v in row.items()} for row in earlier.frame.to_dict("records")]
    done = {(str(r["site"]), str(r["scheme"])) for r in rows}
    count, total = len(done), task.count

    def table() -> SensitivityTable:
        return SensitivityTable.from_rows(graph.id, rows)

    if count == total:
        yield PartialResult(count, total, table)
        return
    for observation in task.observations:
        _ = observation.reference  # before anything is changed
    _ = task.floors  # before anything is changed, too
    for site, schemes in task.choices.items():
        weights = task.weights()
        for scheme in schemes:
            if (site, str(scheme)) in done:
                continue
            with torch.no_grad(), simulate(task.model, {site: scheme}, graph, weights, task.ranges):
                for step, parts in task.bins.items():
                    for metric, (value, error) in _compared(parts).items():
                        if not math.isfinite(value):
                            raise QSearchError(
                                f"the output is not finite with {site} at {scheme} in "
                                f"step bin {step}"
                            )
                        row = {
                            "site": site,
                            "scheme": str(scheme),
                            "step": step,
                            "metric": metric,
                            "estimate": value,
                            "error": error,
                        }
                        rows.append(
                            row
                            | {
                                "floor": task.floor(site, metric, step),
                                "estimator": "sweep",
                                "seed": task.seed,
                            }
                        )
            count += 1
            yield PartialResult(count, total, table)


def _compared(parts: list[Any]) -> dict[str, tuple[float, float]]:
    """Metric -> (value, standard error) of the model as it is now, over all samples of a bin."""
    made = [part.features() for part in parts]
    found = {}
    for metric in made[0]:
        errors = [
            (m[metric] - p.reference[metric]).double().square().sum(1)
            for m, p in zip(made, parts, strict=True)
        ]
        found[metric] = ratio(torch.cat(errors), torch.cat([p.scale[metric] for p in parts]))
    return found
