"""How far a choice moves the weights: no data, no gradients, and no idea of what a layer does; a
baseline.

Two metrics: `weight_error`, the squared error of the weight, and `relative_weight_error`, the same
over the squared weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...core.table import SensitivityTable
from ..estimation import EstimationTask, PartialResult
from ..quantized_weights import weight_of
from ..streaming import present

needs_calls = False


def plan(task: EstimationTask) -> str:
    """Nothing runs."""
    return "no denoiser passes"


def estimate(task: EstimationTask, earlier: SensitivityTable | None) -> Iterator[PartialResult]:
    """An answer a layer; rows of step bin 0, exact. It takes seconds, so what an earlier call did
    is done again.
    """
    rows: list[dict[str, Any]] = []

    def table() -> SensitivityTable:
        return SensitivityTable.from_rows(task.graph.id, rows)

    layers = task.graph.quantizable
    for count, layer in enumerate(layers, start=1):
        with present(task.model.get_submodule(layer.name)):
            weights = task.weights()
            weight = weight_of(task.model, layer.name).data.double()
            for scheme in task.choices.get(layer.name, ()):
                error = float((weights.get(layer.name, scheme).double() - weight).square().sum())
                power = float(weight.square().sum())
                for metric, value in (
                    ("weight_error", error),
                    ("relative_weight_error", error / power if power else 0.0),
                ):
                    row = {
                        "site": layer.name,
                        "scheme": str(scheme),
                        "step": 0,
                        "metric": metric,
                        "estimate": value,
                        "error": 0.0,
                        "floor": 0.0,
                    }
                    rows.append(row | {"estimator": "weight_error", "seed": task.seed})
        yield PartialResult(count, len(layers), table)
