"""ComfyUI: one safetensors file in its mixed-precision layouts, a `comfy_quant` marker beside every
quantized weight and all of them in the header.

What ComfyUI does to the inputs of a layer is part of the scheme. `int8_tensorwise` and
`convrot_w4a4` round them at every call, per row and symmetrically about 0, as `+a8` and `+a4` say
but for the zero point; `full_precision_matrix_mult` in a marker asks for inputs as they are, and is
written where the plan leaves inputs alone. fp8, mxfp8 and nvfp4 have no calibrated input scale here
and always ask for it; `awq_w4a16` never rounds inputs. `~rotate` is ConvRot: the same regular
Hadamard matrices.

Block scales lie in the tiles that tensor cores read (cuBLAS, "1D block scaling factors layout": 128
x 4, of 32 x 16). Layers keep diffusers' names: ComfyUI loads these where it uses them itself
(Qwen-Image, LTX) or converts them; queries, keys and values that its own names fuse share a scheme,
so that a converter finds them alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artifacts import writing
from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...core.words import number_of, split_word
from ...measure.shards import STEM, Weights, key
from ..codes import coded, rows
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..turned import rotation_word, turned
from ..weights import Parts

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = True
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
METADATA = "_quantization_metadata"
_FULL = {"full_precision_matrix_mult": True}
#: scheme without its rotation -> ComfyUI's name of its layout, and what its marker says besides
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "e4m3-t": ("float8_e4m3fn", _FULL),
    "int8-t": ("int8_tensorwise", _FULL),
    "int8-c": ("int8_tensorwise", _FULL),
    "int8-t+a8": ("int8_tensorwise", {}),
    "int8-c+a8": ("int8_tensorwise", {}),
    "uint4-g64": ("awq_w4a16", {"group_size": 64}),
    "nvfp4": ("nvfp4", _FULL),
    "mxfp8": ("mxfp8", _FULL),
}
#: the same of rotated layers, whose marker also says the rotation's group
ROTATED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8-c": ("int8_tensorwise", {"convrot": True, **_FULL}),
    "int8-c+a8": ("int8_tensorwise", {"convrot": True}),
    "int4-c+a4": ("convrot_w4a4", {"linear_dtype": "int4"}),
}
_FOUR_BIT_ROW = 64  # what its kernel of 4-bit inputs wants the channels to be a multiple of
_BLOCK = {"nvfp4": 16, "mxfp8": 32}
_TILE = (128, 4)


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """e4m3 a tensor, int8 a tensor or a channel with inputs as they are or rounded, uint4 in groups
    of 64, nvfp4 and mxfp8; int8 and int4 rotated; of linear layers.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    if _rotates(scheme, layer):
        plain = replace(scheme, transforms=())
        word = rotation_word(_rotation(scheme, layer), layer)
        return replace(nearest_of(plain, layer, [replace(plain, method="")]), transforms=(word,))
    groups = {**_BLOCK, "uint4-g64": 64}
    offers = [name for name in FORMATS if name not in groups or divides(groups[name], layer)]
    return nearest_of(scheme, layer, map(Scheme.parse, offers))


def _rotates(scheme: Scheme, layer: LayerSpec) -> bool:
    """Whether ComfyUI has the rotated scheme for this layer."""
    plain = replace(scheme, method="", transforms=())
    if len(scheme.transforms) != 1 or str(plain) not in ROTATED or not layer.quantizable:
        return False
    channels = layer.weight_shape[1]
    if plain.format == "int4" and channels % _FOUR_BIT_ROW:
        return False
    try:
        return _rotation(scheme, layer) > 0
    except QSearchError:
        return False


def _rotation(scheme: Scheme, layer: LayerSpec) -> int:
    """Channels of a rotation's group; 0 without one."""
    from ...choices.hadamard import group_of

    if not scheme.transforms or split_word(scheme.transforms[0])[0] != "rotate":
        return 0
    return group_of(layer.weight_shape[1], number_of(scheme.transforms[0]))


def write(job: Export, folder: Path) -> list[Path]:
    """One safetensors file, as ComfyUI reads them."""
    weights = job.weights
    layers = {
        layer.name: _entry(job.plan.layers[layer.name], layer)
        for layer in job.graph
        if job.plan.layers[layer.name] != KEEP
    }
    said = json.dumps({"format_version": "1.0", "layers": layers})
    path, parts = folder / f"{STEM}.safetensors", Parts(folder / "tensors.part")
    try:
        with writing(path):
            for group in _tensors(job, weights, layers):
                parts.add(group)
            parts.finish(path, {METADATA: said})
    finally:
        parts.close()
    return [path]


def _entry(scheme: Scheme, layer: LayerSpec) -> dict[str, Any]:
    """What the marker of a layer says."""
    group = _rotation(scheme, layer)
    plain = str(replace(scheme, method="", transforms=()))
    form, more = (ROTATED if group else FORMATS)[plain]
    turned = {"convrot_groupsize": group} if group else {}
    return {"format": form, **more, **turned}


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
    """weight, weight_scale, nvfp4's weight_scale_2 and the zero points of awq_w4a16."""
    import torch

    scheme, name = job.plan.layers[layer.name], f"{layer.name}.weight"
    if scheme.transforms:
        behind = turned(job, layer, weight)
        job, weight = behind.job, behind.weight
    made = rows(job, layer, weight)
    level = made.level.reshape(weight.shape)
    if scheme.family == "int":
        if scheme.format == "int4":
            return {name: _halves(level.to(torch.int8)), f"{name}_scale": made.scale[:, 0].float()}
        scale = made.scale.reshape(()) if scheme.group == -1 else made.scale
        return {name: level.to(torch.int8), f"{name}_scale": scale.float()}
    if scheme.family == "uint":
        kind = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
        return {
            name: _halves(level.to(torch.int8)),
            f"{name}_scale": made.scale.mT.to(kind).contiguous(),
            f"{name}_zeros": ((8 - made.zero) * made.scale).mT.to(kind).contiguous(),
        }
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


def _halves(level: Tensor) -> Tensor:
    """int8 [rows, columns] of 4 bits each -> [rows, columns / 2], the first of two in the low
    bits.
    """
    return (level[:, ::2] & 15) | (level[:, 1::2] << 4)


def tiled(scales: Tensor) -> Tensor:
    """[rows, blocks] -> the same filled up to whole tiles, in the order of tensor cores."""
    import torch

    tall, wide = (-(-n // size) * size for n, size in zip(scales.shape, _TILE, strict=True))
    whole = torch.zeros((tall, wide), dtype=torch.uint8)
    whole[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = whole.view(tall // 128, 4, 32, wide // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(tall, wide).view(scales.dtype)


def markers(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer -> what the header says of it. Raises `QSearchError` for a file without ComfyUI's
    header.
    """
    from safetensors import safe_open

    weights = Weights(folder)
    path = next(iter(weights.files.values()), folder)
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(METADATA, '{"layers": {}}'))["layers"]
        return {name: {**entry, "format": str(entry["format"])} for name, entry in said.items()}
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{path} has no {METADATA} of ComfyUI's ({type(error).__name__}: {error}); export again"
        ) from error


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The header's layers, that each has its marker, and that the tensors have the types and shapes
    of their formats.
    """
    forms, weights = markers(folder), Weights(folder)
    path = next(iter(weights.files.values()), folder)
    made = {layer.name: KEEP for layer in graph}
    for name, entry in forms.items():
        made[name] = _scheme(weights, graph.layer(name), entry)
        if _marker(weights, name) != entry:
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


def _scheme(weights: Weights, layer: LayerSpec, entry: dict[str, Any]) -> Scheme:
    name, form = f"{layer.name}.weight", str(entry["format"])
    group = int(entry.get("convrot_groupsize", 256))
    turned = bool(entry.get("convrot")) or form == "convrot_w4a4"
    full = bool(entry.get("full_precision_matrix_mult"))
    texts = [
        text
        for text, (known, more) in (ROTATED if turned else FORMATS).items()
        if known == form and bool(more.get("full_precision_matrix_mult")) == full
    ]
    if not texts or f"{name}_scale" not in weights.files or name not in weights.files:
        raise QSearchError(
            f"{weights.folder} says {form!r} of {layer.name}: no scheme means it, or it "
            "lacks weight or weight_scale"
        )
    whole = form == "int8_tensorwise" and weights.shape(f"{name}_scale") == ()
    found = Scheme.parse(next((t for t in texts if ("-t" in t) == whole), texts[0]))
    _check_shapes(weights, layer, found, form)
    return replace(found, transforms=(rotation_word(group, layer),)) if turned else found


def _check_shapes(weights: Weights, layer: LayerSpec, scheme: Scheme, form: str) -> None:
    """Refuse tensors that have not the types and shapes of their layout."""
    name = f"{layer.name}.weight"
    out, width = layer.weight_shape
    blocks = width // scheme.group if scheme.group > 0 else 0
    tall, wide = (-(-n // size) * size for n, size in zip((out, blocks), _TILE, strict=True))
    halved = form in ("nvfp4", "convrot_w4a4", "awq_w4a16")
    kinds = {"nvfp4": "U8", "mxfp8": "F8_E4M3", "float8_e4m3fn": "F8_E4M3"}
    scales = {"nvfp4": ("F8_E4M3",), "mxfp8": ("U8",), "awq_w4a16": ("F16", "BF16", "F32")}
    sides = {"nvfp4": (tall, wide), "mxfp8": (tall, wide), "awq_w4a16": (blocks, out)}
    rows_only = {"convrot_w4a4": (out,), "int8_tensorwise": (out, 1) if scheme.group == 0 else ()}
    held = scales.get(form, ("F32",))
    side = sides.get(form, rows_only.get(form, ()))
    wanted = {
        name: ((out, width // 2 if halved else width), (kinds.get(form, "I8"),)),
        f"{name}_scale": (side, held),
        **({f"{name}_zeros": (side, held)} if form == "awq_w4a16" else {}),
    }
    for part, (shape, types) in wanted.items():
        if part not in weights.files:
            raise QSearchError(
                f"{weights.folder}: {form} of {layer.name} lacks {part}; export again"
            )
        if weights.shape(part) != shape or weights.dtype(part) not in types:
            raise QSearchError(
                f"{weights.folder}: {part} is {weights.dtype(part)} {weights.shape(part)}, {form} "
                f"wants {' or '.join(types)} {shape}"
            )
