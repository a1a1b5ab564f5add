"""optimum-quanto's quantized weights in a diffusers folder, with the map of formats that its
`requantize` and `from_pretrained` read.

quanto fixes the groups of its 2 and 4 bits by the width of a row (128 weights, or 96, 64, 32 where
that divides it; else a whole row), and stores the product of scale and zero point beside the scale.
Its 8 bits, integers and floats, have a scale for each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import Weights, key
from ..codes import rows
from ..exporting import Export
from ..nearest import nearest as nearest_of
from ..nearest import width
from ..weights import copy_config, limit_of, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs = ("optimum-quanto",)
writes_weights = True
fuses = False
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
FILE = "quanto_qmap.json"
TYPES = {
    "int8": "qint8",
    "e4m3": "qfloat8_e4m3fn",
    "e5m2": "qfloat8_e5m2",
    "uint4": "qint4",
    "uint2": "qint2",
}


def _offers(layer: LayerSpec) -> list[Scheme]:
    if layer.kind not in ("linear", "conv2d") or layer.parts:
        return []
    size = _group(width(layer))
    return [Scheme(form, size if form.startswith("uint") else 0) for form in TYPES]


def _group(columns: int) -> int:
    """What quanto's modules do with rows of so many weights (`QModuleMixin.__init__`); 0 = the
    whole row.
    """
    return next((n for n in (128, 96, 64, 32) if columns > 128 and columns % n == 0), 0)


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers and convolutions: 2 and 4 bits with zero points, integers and floats of 8 bits
    by row.
    """
    return nearest_of(scheme, layer, _offers(layer))


def write(job: Export, folder: Path) -> list[Path]:
    """config.json, quanto_qmap.json, and safetensors in quanto's layout."""
    weights = job.weights
    formats = {
        layer.name: TYPES[scheme.format]
        for layer in job.graph
        if (scheme := job.plan.layers[layer.name]) != KEEP
    }
    path = folder / FILE
    path.write_text(
        json.dumps(
            {name: {"weights": kind, "activations": "none"} for name, kind in formats.items()},
            indent=4,
        ),
        encoding="utf-8",
    )
    return [
        copy_config(weights, folder),
        path,
        *write_shards(folder, _groups(job, weights), limit_of(weights)),
    ]


def _groups(job: Export, weights: Weights) -> Iterator[dict[str, Tensor]]:
    layers = {key(layer): layer for layer in job.graph if job.plan.layers[layer.name] != KEEP}
    for name in weights.files:
        held = weights.tensor(name)
        yield _tensors(job, layers[name], held) if name in layers else {name: held}


def _tensors(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    import torch
    from optimum.quanto import qtypes
    from optimum.quanto.tensor.packed import pack_weights

    scheme, made = job.plan.layers[layer.name], rows(job, layer, weight)
    scale = made.scale.to(weight.dtype)
    ones = {
        f"{layer.name}.{end}_scale": torch.ones((), dtype=weight.dtype)
        for end in ("input", "output")
    }
    name = key(layer)
    if scheme.bits == 8:
        data = made.level.reshape(weight.shape).to(qtypes[TYPES[scheme.format]].dtype)
        return {
            f"{name}._data": data,
            f"{name}._scale": scale.reshape(-1, *[1] * (weight.ndim - 1)),
            **ones,
        }
    code = made.level.to(torch.uint8).reshape((-1, scheme.group) if scheme.group else weight.shape)
    shape = (-1, *[1] * (code.ndim - 1))  # quanto's groups are rows of their own
    shift = (made.scale * made.zero).to(weight.dtype)
    return {
        f"{name}._data._data": pack_weights(code, scheme.bits),
        f"{name}._scale": scale.reshape(shape),
        f"{name}._shift": shift.reshape(shape),
        **ones,
    }


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The map of formats, and that the files hold tensors of them."""
    try:
        said = {
            name: str(entry["weights"])
            for name, entry in json.loads((folder / FILE).read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / FILE} is not a map of formats ({type(error).__name__}: {error}); "
            "export again"
        ) from error
    weights = Weights(folder)
    names = {kind: form for form, kind in TYPES.items()}
    made = {layer.name: KEEP for layer in graph}
    for name, kind in said.items():
        layer = graph.layer(name)
        if kind not in names:
            raise QSearchError(
                f"{name} is {kind!r} in {folder / FILE}, which no scheme means; known are "
                f"{', '.join(names)}"
            )
        form = names[kind]
        made[name] = Scheme(form, _group(width(layer)) if form.startswith("uint") else 0)
    for layer in graph:
        form = made[layer.name].format
        part = "" if form == "keep" else "._data._data" if form.startswith("uint") else "._data"
        if key(layer) + part not in weights.files:
            raise QSearchError(
                f"{folder / FILE} says {made[layer.name]} of {layer.name}, and the "
                f"weights hold no {key(layer)}{part}"
            )
    return made
