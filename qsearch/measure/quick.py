"""Quick: sensitivities guessed from a model's files alone, before anything runs: the relative error
of each layer's weight.

What an error costs in layers of a role in another architecture was tried as a factor, and made the
ranking worse (`notebooks/figures/quick.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..choices.input_quantizer import needs_inputs, words_of
from ..choices.quantization import joined, quantize_parts
from ..core.cost import can_have
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .shards import Weights, key

#: weights of a layer that are looked at: rows at even distances
_LOOKED = 2**20
#: rank correlation of guesses with measured noise over all layers and schemes, the smaller of two
#: models (quick.json)
SPEARMAN = 0.68


def guess(
    graph: OpGraph,
    folder: Path,
    schemes: Sequence[Scheme | str],
    *,
    component: str,
    variant: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SensitivityTable:
    """A table of guesses for each quantizable layer and scheme, in one step bin.

    Args:
        graph: of the denoiser.
        folder: of the saved pipeline.
        schemes: for weights alone, without calibration.
        component: folder of the denoiser, where the graph has no components of its own.
        variant: of the files.
        progress: called with the weights of each layer that is done.

    Returns:
        The table; its metric `noise` is the relative weight error, in no unit of noise.

    Raises:
        QSearchError: a scheme does more than round weights.
    """
    asked = [Scheme.parse(s) for s in schemes]
    for scheme in asked:
        if needs_inputs(scheme) or scheme.activation or words_of(scheme):
            raise QSearchError(
                f"a guess goes by weights alone; {scheme} also looks at inputs: profile "
                "it, or leave it out"
            )
    rows: list[dict[str, Any]] = []
    files = {
        name: Weights(folder / name, variant=variant) for name in graph.components or (component,)
    }
    for layer in graph.quantizable:
        part = graph.component(layer.name) or component
        own = key(layer).removeprefix(f"{part}.") if graph.components else key(layer)
        weight = files[part].tensor(own)
        errors = relative_errors(weight, layer, [s for s in asked if can_have(layer, s)])
        rows += [
            {
                "site": layer.name,
                "scheme": str(scheme),
                "step": 0,
                "metric": "noise",
                "estimate": error,
                "error": 0.0,
                "floor": 0.0,
                "estimator": "quick",
                "seed": 0,
            }
            for scheme, error in errors.items()
        ]
        if progress is not None:
            progress(layer.weights)
    return SensitivityTable.from_rows(graph.id, rows)


@torch.no_grad()
def relative_errors(
    weight: Tensor, layer: LayerSpec, schemes: Sequence[Scheme]
) -> dict[Scheme, float]:
    """Scheme -> squared error of some rows of a weight over their squares."""
    axis, found = layer.channel_axis, {}
    each = max(1, -(-weight.numel() // _LOOKED))
    chosen = torch.arange(0, weight.shape[axis], each)
    rows = weight.index_select(axis, chosen).float()
    power = float(rows.double().square().sum())
    for scheme in schemes:
        if scheme.format == "keep":
            found[scheme] = 0.0
            continue
        made = quantize_parts(rows, scheme, axis=axis, splits=layer.parts, layer=layer.name)
        error = float((joined(made) - rows).double().square().sum())
        found[scheme] = error / power if power else 0.0
    return found
