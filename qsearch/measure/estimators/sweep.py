"""One layer at a time: change it, run the denoiser, compare. The slow twin that the fast estimators must agree with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import QSearchError
from ...core.graph import OpGraph
from ...core.scheme import Scheme
from ..noise import relative_noise
from ..pipelines import Call, run
from ..simulation import QuantizedWeights, simulate


def estimate(
    model: nn.Module, graph: OpGraph, schemes: Sequence[Scheme], calls: Sequence[Call], done: frozenset[tuple[str, str]]
) -> Iterator[list[dict[str, Any]]]:
    """One list of rows (a row a step bin) for every (layer, scheme) not in `done`.

    The metric is `noise`: squared error of the output over the squared output, pooled over the samples of the call; its standard error is
    that of a ratio of means. The floor is what the same forward gives when only the batch is cut differently.
    """
    references = [run(model, call) for call in calls]
    floors = [_floor(model, call, y) for call, y in zip(calls, references, strict=True)]
    for layer in graph.quantizable:
        weights = QuantizedWeights(model, graph)  # one layer's variants at a time are kept
        for scheme in schemes:
            if (layer.name, str(scheme)) in done:
                continue
            rows = []
            with simulate(model, {layer.name: scheme}, graph, weights):
                for i, (call, reference) in enumerate(zip(calls, references, strict=True)):
                    value, error = relative_noise(run(model, call), reference)
                    if not math.isfinite(value):
                        raise QSearchError(f"the output is not finite with {layer.name} at {scheme} in step bin {i}")
                    row = {"site": layer.name, "scheme": str(scheme), "step": i, "metric": "noise", "estimate": value, "error": error}
                    rows.append(row | {"floor": floors[i]})
            yield rows


def _floor(model: nn.Module, call: Call, reference: Tensor) -> float:
    n = len(reference)
    if n < 2:
        return 0.0
    parts = [run(model, _cut(call, slice(i, i + 1), n)) for i in range(n)]
    return relative_noise(torch.cat(parts), reference)[0]


def _cut(call: Call, part: slice, size: int) -> Call:
    def cut(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size:
            return x[part]
        if isinstance(x, dict):
            return {k: cut(v) for k, v in x.items()}
        return x

    return Call(tuple(cut(a) for a in call.args), {k: cut(v) for k, v in call.kwargs.items()}, call.step)
