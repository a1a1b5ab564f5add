"""ComfyUI: one safetensors file in its mixed-precision layouts, a `comfy_quant` marker beside every
quantized weight and all of them in the header.

What ComfyUI does to the inputs of a layer is part of the scheme. `int8_tensorwise` and
`convrot_w4a4` round them at every call, per row and symmetrically about 0, as `+a8` and `+a4` say
but for the zero point; `full_precision_matrix_mult` in a marker asks for inputs as they are, and is
written where the plan leaves inputs alone. fp8, mxfp8 and nvfp4 have no calibrated input scale here
and always ask for it; `awq_w4a16` never rounds inputs. `~rotate` is ConvRot: the same regular
Hadamard matrices; `asym_w4a8_int8` requires them over 256 channels, where its fused kernels are.

Tensors have the names of the models' original checkpoints, which are ComfyUI's own
(`original_names`): layers that are one there share a scheme. A format with one scale a tensor has
one for all of these. Other models keep diffusers' names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artifacts import writing
from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...core.words import number_of, split_word
from ...measure.shards import STEM, Weights, key
from ..comfyui_layout import check_shapes, packed
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..original_names import LAYOUTS, Original, computed, layout_of, originals, stacked, whole
from ..original_names import tied as tied_of
from ..turned import rotation_word
from ..weights import Parts

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = False  # `tied` says what its own checkpoints hold as one
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
transforms = ("~rotate",)
METADATA = "_quantization_metadata"
#: in the header: the class whose original names the file has
_LAYOUT = "original_names"
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
    # rotated whatever its marker says; SGLang requires the marker
    "cb4": ("asym_w4a8_int8", {"group_size": 16, "convrot": True, **_FULL}),
    "cb4+a8": ("asym_w4a8_int8", {"group_size": 16, "convrot": True}),
}
_ALWAYS_ROTATED = ("convrot_w4a4", "asym_w4a8_int8")
#: channels of the one rotation that the kernels of 4-bit levels on int8 take
_LEVELS_TURN = 256
_FOUR_BIT_ROW = 64  # the channels of its kernel of 4-bit inputs are a multiple of this
_BLOCK = {"nvfp4": 16, "mxfp8": 32}
#: layers by whose columns ComfyUI tells one model from another: two codes a byte would halve them
_TOLD_BY = re.compile(
    r"(^|\.)(x_embedder|context_embedder|text_embedder\.linear_1|cap_embedder\.1|"
    r"add_embedding\.linear_1|attentions\.\d+\.transformer_blocks\.0\.attn2\.to_k)$"
)
_PACKED = ("uint4", "nvfp4", "int4", "cb4")


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """e4m3 a tensor, int8 a tensor or a channel with inputs as they are or rounded, uint4 in groups
    of 64, nvfp4 and mxfp8; int8, int4 and cb4 rotated; of linear layers.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    if _rotates(scheme, layer):
        plain = replace(scheme, transforms=())
        word = rotation_word(_rotation(scheme, layer), layer)
        return replace(nearest_of(plain, layer, [replace(plain, method="")]), transforms=(word,))
    groups = {**_BLOCK, "uint4-g64": 64}
    offers = [name for name in FORMATS if name not in groups or divides(groups[name], layer)]
    if _TOLD_BY.search(layer.name):
        offers = [name for name in offers if not name.startswith(_PACKED)]
    return nearest_of(scheme, layer, map(Scheme.parse, offers))


def _rotates(scheme: Scheme, layer: LayerSpec) -> bool:
    """Whether ComfyUI has the rotated scheme for this layer."""
    plain = replace(scheme, method="", transforms=())
    if len(scheme.transforms) != 1 or str(plain) not in ROTATED or not layer.quantizable:
        return False
    channels = layer.weight_shape[1]
    if plain.format in _PACKED and _TOLD_BY.search(layer.name):
        return False
    if plain.format == "int4" and channels % _FOUR_BIT_ROW:
        return False
    try:
        group = _rotation(scheme, layer)
    except QSearchError:
        return False
    return group == _LEVELS_TURN if plain.format == "cb4" else group > 0


def _rotation(scheme: Scheme, layer: LayerSpec) -> int:
    """Channels of a rotation's group; 0 without one."""
    from ...choices.hadamard import group_of

    if not scheme.transforms or split_word(scheme.transforms[0])[0] != "rotate":
        return 0
    return group_of(layer.weight_shape[1], number_of(scheme.transforms[0]))


def write(job: Export, folder: Path) -> list[Path]:
    """One safetensors file, as ComfyUI reads them."""
    weights = job.weights
    layout = layout_of(weights.config)
    names = originals(layout, weights.files)
    job = stacked(job, names)
    layers = {
        layer.name: _entry(job.plan.layers[layer.name], layer)
        for layer in job.graph
        if job.plan.layers[layer.name] != KEEP
    }
    said = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
    if layout:
        said[_LAYOUT] = layout
    path, parts = folder / f"{STEM}.safetensors", Parts(folder / "tensors.part")
    try:
        with writing(path):
            for group in _tensors(job, names, layers):
                parts.add(group)
            parts.add(computed(layout, weights.config))
            parts.finish(path, said)
    finally:
        parts.close()
    return [path]


def tied(graph: OpGraph) -> list[tuple[str, ...]]:
    """Layers that are one in the original checkpoint, besides queries, keys and values."""
    return tied_of(graph)


def _entry(scheme: Scheme, layer: LayerSpec) -> dict[str, Any]:
    """What the marker of a layer says."""
    group = _rotation(scheme, layer)
    plain = str(replace(scheme, method="", transforms=()))
    form, more = (ROTATED if group else FORMATS)[plain]
    turned = {"convrot_groupsize": group} if group else {}
    return {"format": form, **more, **turned}


def _tensors(
    job: Export, names: Mapping[str, Original], said: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of one name after the other: of a model that need not fit in memory."""
    import torch

    weights = job.weights
    layers = {key(layer): layer for layer in job.graph if layer.name in said}
    for name, original in names.items():
        held = original.of(weights)
        if name not in layers:
            yield {name: held}
            continue
        marker = json.dumps(said[layers[name].name]).encode()
        made = {"comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}
        made |= packed(job, layers[name], held)
        yield {f"{layers[name].name}.{part}": tensor for part, tensor in made.items()}


def markers(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer, by its name in the file -> what the header says of it. Raises `QSearchError` for a
    file without ComfyUI's header.
    """
    path, said = _header(folder)
    try:
        layers = json.loads(said.get(METADATA, '{"layers": {}}'))["layers"]
        return {name: {**entry, "format": str(entry["format"])} for name, entry in layers.items()}
    except MISSHAPEN as error:
        raise _unread(path, error) from error


def _header(folder: Path) -> tuple[Path, dict[str, str]]:
    from safetensors import safe_open

    path = next(iter(Weights(folder).files.values()), folder)
    try:
        with safe_open(path, framework="pt") as file:
            return path, file.metadata() or {}
    except (OSError, *MISSHAPEN) as error:
        raise _unread(path, error) from error


def _unread(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} has no {METADATA} of ComfyUI's ({type(error).__name__}: {error}); export again"
    )


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The header's layers, that each has its marker, and that the tensors have the types and shapes
    of their formats.
    """
    forms, weights = markers(folder), Weights(folder)
    path, said = _header(folder)
    layout = said.get(_LAYOUT, "")
    if layout not in ("", *LAYOUTS):
        raise QSearchError(f"{path}: no original names of {layout!r} are known; export again")
    layers = whole(graph, originals(layout, map(key, graph)))
    made = {layer.name: KEEP for layer in graph}
    for layer, parts in layers:
        entry = forms.pop(layer.name, None)
        if entry is not None:
            scheme = _scheme(weights, layer, entry)
            made |= {part.name: scheme for part in parts}
            if _marker(weights, layer.name) != entry:
                raise QSearchError(f"{path}: the marker of {layer.name} and the header differ")
        elif key(layer) not in weights.files or weights.shape(key(layer)) != layer.weight_shape:
            raise QSearchError(
                f"{path} keeps {layer.name}, and holds no {key(layer)} of {layer.weight_shape}"
            )
    for name in forms:
        graph.layer(name)  # that it has none of this name is the usual reason
        raise QSearchError(f"{path} names {name}, which is part of another layer there")
    return made


def _marker(weights: Weights, name: str) -> Any:
    try:
        return json.loads(bytes(weights.tensor(f"{name}.comfy_quant").tolist()))
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{weights.folder}: {name}.comfy_quant is no JSON ({error}); export again"
        ) from error


def _scheme(weights: Weights, layer: LayerSpec, entry: dict[str, Any]) -> Scheme:
    scale, form = f"{layer.name}.weight_scale", str(entry["format"])
    group = int(entry.get("convrot_groupsize", 256))
    turned = bool(entry.get("convrot")) or form in _ALWAYS_ROTATED
    full = bool(entry.get("full_precision_matrix_mult"))
    texts = [
        text
        for text, (known, more) in (ROTATED if turned else FORMATS).items()
        if known == form and bool(more.get("full_precision_matrix_mult")) == full
    ]
    if not texts:
        raise QSearchError(f"{weights.folder} says {form!r} of {layer.name}: no scheme means it")
    whole = form == "int8_tensorwise" and scale in weights.files and weights.shape(scale) == ()
    found = Scheme.parse(next((t for t in texts if ("-t" in t) == whole), texts[0]))
    check_shapes(weights, layer, found, form)
    return replace(found, transforms=(rotation_word(group, layer),)) if turned else found
