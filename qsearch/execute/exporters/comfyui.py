"""ComfyUI: one safetensors file in its mixed-precision layouts, a `comfy_quant` marker beside every quantized weight and all of them in the header.

fp8 weights ask for `full_precision_matrix_mult`, since no input scale was calibrated. Block scales lie in the tiles that tensor cores read (cuBLAS,
"1D block scaling factors layout": 128 x 4, of 32 x 16). Layers keep diffusers' names: ComfyUI loads these where it uses them itself (Qwen-Image, LTX)
or converts them; queries, keys and values that its own names fuse share a scheme, so that a converter finds them alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ..codes import coded, rows
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..weights import Weights, key, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = True
has_steps = False
METADATA = "_quantization_metadata"
#: scheme -> ComfyUI's name of its layout, and what its marker says besides
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "e4m3-t": ("float8_e4m3fn", {"full_precision_matrix_mult": True}),
    "int8-t": ("int8_tensorwise", {}),
    "int8-c": ("int8_tensorwise", {}),
    "nvfp4": ("nvfp4", {"full_precision_matrix_mult": True}),
    "mxfp8": ("mxfp8", {"full_precision_matrix_mult": True}),
}
_BLOCK = {"nvfp4": 16, "mxfp8": 32}
_TILE = (128, 4)


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """e4m3 a tensor, int8 a tensor or a channel, nvfp4 and mxfp8, of linear layers; inputs as they are."""
    offers = (
        [name for name in FORMATS if name not in _BLOCK or divides(_BLOCK[name], layer)]
        if layer.kind == "linear" and not layer.parts
        else []
    )
    return nearest_of(scheme, layer, map(Scheme.parse, offers))


def write(job: Export, folder: Path) -> list[Path]:
    """One safetensors file, as ComfyUI reads them."""
    weights = job.weights
    layers = {
        name: {"format": FORMATS[text][0], **FORMATS[text][1]}
        for name, text in _chosen(job).items()
    }
    said = json.dumps({"format_version": "1.0", "layers": layers})
    return write_shards(folder, _tensors(job, weights, layers), 2**62, lambda _: {METADATA: said})


def _chosen(job: Export) -> dict[str, str]:
    plain = {
        layer.name: Scheme(s.format, s.group)
        for layer in job.graph
        if (s := job.plan.layers[layer.name]) != KEEP
    }
    return {name: str(scheme) for name, scheme in plain.items()}


def _tensors(
    job: Export, weights: Weights, said: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Tensor]]:
    import torch

    layers = {key(layer): layer for layer in job.graph if layer.name in said}
    for name in weights.files:
        held = weights.tensor(name)
        if name not in layers:
            yield {name: held}
            continue
        marker = json.dumps(said[layers[name].name]).encode()
        yield packed(job, layers[name], held) | {
            f"{layers[name].name}.comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)
        }


def packed(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    """weight, weight_scale, and nvfp4's weight_scale_2."""
    import torch

    scheme, made = job.plan.layers[layer.name], rows(job, layer, weight)
    level, name = made.level.reshape(weight.shape), f"{layer.name}.weight"
    if scheme.family == "int":
        scale = made.scale.reshape(()) if scheme.group == -1 else made.scale
        return {name: level.to(torch.int8), f"{name}_scale": scale.float()}
    if scheme.family == "float":
        return {
            name: level.to(torch.float8_e4m3fn),
            f"{name}_scale": made.scale.reshape(()).float(),
        }
    code = coded(job, layer, weight)
    scale = code.scale[..., 0]
    if scheme.format == "mxfp8":
        return {
            name: level.to(torch.float8_e4m3fn),
            f"{name}_scale": tiled((scale.log2() + 127).to(torch.uint8)),
        }
    nibble = code.codes.reshape(weight.shape)
    halves = (nibble[:, ::2] << 4) | nibble[:, 1::2]  # the first of two codes in the high bits
    return {
        name: halves,
        f"{name}_scale": tiled(scale.to(torch.float8_e4m3fn)),
        f"{name}_scale_2": torch.tensor(code.unit),
    }


def tiled(scales: Tensor) -> Tensor:
    """[rows, blocks] -> the same filled up to whole tiles, in the order of tensor cores."""
    import torch

    tall, wide = (-(-n // size) * size for n, size in zip(scales.shape, _TILE, strict=True))
    whole = torch.zeros((tall, wide), dtype=torch.uint8)
    whole[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = whole.view(tall // 128, 4, 32, wide // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall, wide).view(scales.dtype)


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The header's layers, that each has its marker, and that the tensors have the types and shapes of their formats."""
    from safetensors import safe_open

    weights = Weights(folder)
    path = next(iter(weights.files.values()), folder)
    made = {layer.name: KEEP for layer in graph}
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(METADATA, '{"layers": {}}'))["layers"]
        named = dict(said.items())
        forms = {name: str(entry["format"]) for name, entry in named.items()}
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{path} has no {METADATA} of ComfyUI's ({type(error).__name__}: {error}); export again"
        ) from error
    for name, form in forms.items():
        layer = graph.layer(name)
        made[name] = _scheme(weights, layer, form)
        if _marker(weights, name) != named[name]:
            raise QSearchError(f"{path}: the marker of {name} and the header differ")
    for layer in graph:
        if made[layer.name] == KEEP and (
            key(layer) not in weights.files or weights.shape(key(layer)) != layer.weight_shape
        ):
            raise QSearchError(
                f"{path} keeps {layer.name}, and holds no {key(layer)} of {layer.weight_shape}"
            )
    return made


def _marker(weights: Weights, name: str) -> Any:
    try:
        return json.loads(bytes(weights.tensor(f"{name}.comfy_quant").tolist()))
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{weights.folder}: {name}.comfy_quant is no JSON ({error}); export again"
        ) from error


def _scheme(weights: Weights, layer: LayerSpec, form: str) -> Scheme:
    name = f"{layer.name}.weight"
    texts = [text for text, (known, _) in FORMATS.items() if known == form]
    if not texts or f"{name}_scale" not in weights.files or name not in weights.files:
        raise QSearchError(
            f"{weights.folder} says {form!r} of {layer.name}: no scheme means it, or it lacks weight or weight_scale"
        )
    scheme = Scheme.parse(
        "int8-c" if form == "int8_tensorwise" and weights.shape(f"{name}_scale") else texts[0]
    )
    out, width = layer.weight_shape
    blocks = width // scheme.group if scheme.group > 0 else 0
    tall, wide = (-(-n // size) * size for n, size in zip((out, blocks), _TILE, strict=True))
    shapes = {
        name: (
            (out, width // 2) if form == "nvfp4" else (out, width),
            {"nvfp4": "U8", "int8_tensorwise": "I8"}.get(form, "F8_E4M3"),
        ),
        f"{name}_scale": (
            (tall, wide) if blocks else (out, 1) if scheme.group == 0 else (),
            {"nvfp4": "F8_E4M3", "mxfp8": "U8"}.get(form, "F32"),
        ),
    }
    for part, wanted in shapes.items():
        if (weights.shape(part), weights.dtype(part)) != wanted:
            raise QSearchError(
                f"{weights.folder}: {part} is {weights.dtype(part)} {weights.shape(part)}, {form} wants {wanted[1]} {wanted[0]}"
            )
    return scheme
