"""AIMET: an encodings file for `QuantizationSimModel.load_encodings`, a list of ranges and scales
for each weight and each rounded input.

In AIMET's format (0.6.1, by PyTorch names) a weight has an entry for each channel: `bitwidth`,
`is_symmetric`, `min`, `max`, `scale`, `offset`. The grid is what the plan's method found; AIMET
rounds to nearest on it, so that methods which round otherwise lose that. Inputs have one entry,
from calibration. Load it with `partial=False`: what the file leaves out is then not quantized.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import key
from ..codes import rows
from ..exporting import Export
from ..nearest import nearest as nearest_of

needs: tuple[str, ...] = ()
writes_weights = False
fuses = False
has_steps = False
takes: tuple[str, ...] = ("denoiser", "text encoder", "vae")
FILE = "model.encodings"
_KINDS = ("linear", "conv1d", "conv2d", "conv3d")
_NEAREST = (
    "minmax",
    "search",
)  # methods that round to nearest on the grid they choose, with whole zero points


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Integers a channel; inputs in 8 bits per tensor. Methods that choose ranges stay, those that
    learn rounding go.
    """
    if layer.kind not in _KINDS or layer.channel_axis != 0 or layer.parts:
        return nearest_of(scheme, layer, [])
    names = [
        f"{sign}{bits}-c{inputs}"
        for sign in ("int", "uint")
        for bits in range(2, 9)
        for inputs in ("", "+a8t")
    ]
    plain = scheme if scheme.method in _NEAREST else replace(scheme, method="")
    return nearest_of(plain, layer, map(Scheme.parse, names))


def write(job: Export, folder: Path) -> list[Path]:
    """model.encodings."""
    weights = job.weights
    held: dict[str, Any] = {"version": "0.6.1", "activation_encodings": {}, "param_encodings": {}}
    for layer in job.graph:
        scheme = job.plan.layers[layer.name]
        if scheme == KEEP:
            continue
        made = rows(job, layer, weights.tensor(key(layer)))
        low, top = _ends(scheme)
        pairs = zip(made.scale.flatten().tolist(), made.zero.flatten().tolist(), strict=True)
        held["param_encodings"][key(layer)] = [
            _entry(scheme.bits, scheme.family == "int", scale, low - zero, top - zero)
            for scale, zero in pairs
        ]
        if scheme.activation:
            held["activation_encodings"][layer.name] = {"input": {"0": _input(job, layer)}}
    path = folder / FILE
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return [path]


def _ends(scheme: Scheme) -> tuple[int, int]:
    half = 2 ** (scheme.bits - 1)
    return (-half, half - 1) if scheme.family == "int" else (0, 2 * half - 1)


def _entry(bits: int, symmetric: bool, scale: float, low: float, top: float) -> dict[str, Any]:
    """An encoding of levels `low` to `top`; `offset` is the lowest of them."""
    ends = {"min": low * scale, "max": top * scale, "scale": scale, "offset": int(low)}
    return {"bitwidth": bits, "dtype": "int", "is_symmetric": str(symmetric), **ends}


def _input(job: Export, layer: LayerSpec) -> dict[str, Any]:
    from ...choices.codes import qparams_from_range

    seen = job.calibration.get(layer.name)
    if seen is None:
        raise QSearchError(
            f"{job.plan.layers[layer.name]} needs the range of what goes into "
            f"{layer.name}; export with calibration"
        )
    scale, zero = qparams_from_range(seen.low.min(), seen.high.max(), Scheme("uint8"))
    return _entry(8, False, float(scale), -float(zero), 255 - float(zero))


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """Widths and symmetry of the encodings, one a channel, whose names must be weights of the
    graph.
    """
    path = folder / FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        made = {layer.name: KEEP for layer in graph}
        keys = {key(layer): layer for layer in graph}
        for name, entries in said["param_encodings"].items():
            layer = keys.get(name) or graph.layer(str(name).removesuffix(".weight"))
            made[layer.name] = _scheme(path, layer, entries)
        for name, ports in said["activation_encodings"].items():
            if made[graph.layer(name).name] == KEEP or _one(path, name, [ports["input"]["0"]]) != (
                8,
                False,
            ):
                raise QSearchError(
                    f"{path} rounds the input of {name} otherwise than in 8 bits beside a "
                    "quantized weight"
                )
            made[name] = Scheme.parse(f"{made[name]}+a8t")
        return made
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{path} holds no encodings of AIMET's ({type(error).__name__}: {error}); export again"
        ) from error


def _scheme(path: Path, layer: LayerSpec, entries: Any) -> Scheme:
    bits, symmetric = _one(path, layer.name, entries)
    if len(entries) != layer.weight_shape[layer.channel_axis]:
        raise QSearchError(
            f"{path} has {len(entries)} encodings for the "
            f"{layer.weight_shape[layer.channel_axis]} channels of {layer.name}"
        )
    return Scheme.parse(f"{'int' if symmetric else 'uint'}{bits}-c")


def _one(path: Path, name: str, entries: Any) -> tuple[int, bool]:
    """The width and symmetry that all entries share, each of which must be a grid: a scale above
    zero, ends that it reaches.
    """
    found = {
        (int(e["bitwidth"]), {"True": True, "False": False}[e["is_symmetric"]]) for e in entries
    }
    if len(found) != 1:
        raise QSearchError(
            f"{path}: the encodings of {name} differ in width or symmetry, or are none"
        )
    for e in entries:
        numbers = [float(e[k]) for k in ("scale", "min", "max", "offset")]
        if (
            not all(map(math.isfinite, numbers))
            or numbers[0] <= 0
            or not math.isclose(numbers[1], numbers[0] * numbers[3], rel_tol=1e-3, abs_tol=1e-9)
        ):
            raise QSearchError(f"{path}: an encoding of {name} is no grid: {str(e)[:120]}")
    return found.pop()
