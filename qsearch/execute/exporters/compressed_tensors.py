"""compressed-tensors: packed weights and `config_groups` with exact names, as vLLM, SGLang and
llm-compressor read them.

A group of `quantization_config` is a scheme, its targets are the full names of its layers: names go
before patterns there, so that none can be caught by another's. Values are stored as the tool's own
compressors do (`pack-quantized`, `int-quantized`, `float-quantized`, `nvfp4-pack-quantized`,
`mxfp4-`, `mxfp8-`), with its own packing. Linear layers only: the tool has no convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import Weights, key
from ..codes import coded, rows
from ..exporting import Export
from ..nearest import divides, whole
from ..nearest import nearest as nearest_of
from ..weights import copy_config, limit_of, replaced, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs = ("compressed-tensors",)
writes_weights = True
fuses = False
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
GROUPS = (16, 32, 64, 128, 256)
#: block format -> (bits, group, the tool's name of the layout, whether the tensor has a scale of
#: its own)
BLOCKS = {
    "nvfp4": (4, 16, "nvfp4-pack-quantized", True),
    "mxfp4": (4, 32, "mxfp4-pack-quantized", False),
    "mxfp8": (8, 32, "mxfp8-quantized", False),
}


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Integers of 2 to 8 bits a channel or in groups, e4m3 a channel, nvfp4, mxfp4 and mxfp8;
    inputs per token in integers, or in e4m3 where weights are.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    sizes = [
        "c",
        *(
            f"g{g}"
            for g in sorted({*GROUPS, *([scheme.group] if scheme.group > 0 else [])})
            if divides(g, layer)
        ),
    ]
    names = [
        f"{sign}{bits}-{size}{inputs}"
        for sign in ("int", "uint")
        for bits in range(2, 9)
        for size in sizes
        for inputs in ("", "+a8", "+a6", "+a4")
    ]
    names += [
        "e4m3-c",
        "e4m3-c+ae4m3",
        *(form for form, (_, group, *_) in BLOCKS.items() if divides(group, layer)),
    ]
    return nearest_of(whole(scheme), layer, map(Scheme.parse, names))


def layout(scheme: Scheme) -> str:
    """The tool's name for how a scheme is stored."""
    if scheme.format in BLOCKS:
        return BLOCKS[scheme.format][2]
    if scheme.family == "float":
        return "float-quantized"
    return (
        "int-quantized"
        if scheme.format == "int8" and scheme.group == 0 and scheme.activation
        else "pack-quantized"
    )


def entry(scheme: Scheme) -> dict[str, Any]:
    """A config group without its targets."""
    kind = "float" if scheme.family in ("float", "block") else "int"
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": kind,
        "symmetric": scheme.family != "uint",
        "dynamic": False,
    }
    if scheme.format in BLOCKS:
        own = BLOCKS[scheme.format][3]
        scales = "torch.float8_e4m3fn" if own else "torch.uint8"
        weights |= {
            "strategy": "tensor_group" if own else "group",
            "group_size": scheme.group,
            "scale_dtype": scales,
            "zp_dtype": scales,
        }
    else:
        weights |= (
            {"strategy": "group", "group_size": scheme.group}
            if scheme.group
            else {"strategy": "channel"}
        )
    inputs = None
    if scheme.activation:
        integer = scheme.activation.isdigit()
        inputs = {
            "num_bits": scheme.activation_bits,
            "type": "int" if integer else "float",
            "symmetric": not integer,
            "strategy": "token",
            "dynamic": True,
        }
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout(scheme),
    }


def scheme_of(group: Mapping[str, Any]) -> Scheme:
    """The scheme that a config group means. Raises `QSearchError` for one that no scheme here
    means.
    """
    try:
        weights, inputs = group["weights"], group.get("input_activations")
        bits, size = int(weights["num_bits"]), weights.get("group_size")
        if weights["type"] == "float":
            name = next(
                (form for form, (b, g, *_) in BLOCKS.items() if (b, g) == (bits, size)),
                "e4m3-c" if bits == 8 else f"float{bits}",
            )
        else:
            kind = "int" if weights.get("symmetric", True) else "uint"
            name = f"{kind}{bits}-{f'g{int(size)}' if weights['strategy'] == 'group' else 'c'}"
        if inputs is not None:
            name += "+a" + ("e4m3" if inputs["type"] == "float" else str(int(inputs["num_bits"])))
        found = Scheme.parse(name)
        if {**entry(found), "targets": None} != {**group, "targets": None}:
            raise QSearchError(f"the group says more than {found} does: {str(dict(group))[:200]}")
        return found
    except MISSHAPEN as error:
        raise QSearchError(
            "a config group has weights with num_bits, type and strategy; given "
            f"{str(group)[:80]!r} ({type(error).__name__}: {error})"
        ) from error


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with `quantization_config`, and safetensors in the tool's layouts."""
    from importlib import metadata

    weights = job.weights
    found: dict[str, list[str]] = {}
    for layer in job.graph:
        found.setdefault(str(_plain(job, layer)), []).append(layer.name)
    kept = found.pop(str(KEEP), [])
    groups = {
        f"group_{i}": {**entry(Scheme.parse(text)), "targets": names}
        for i, (text, names) in enumerate(found.items())
    }
    layouts = {group["format"] for group in groups.values()}
    said = {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision" if layouts else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "version": metadata.version("compressed-tensors"),
    }
    files = write_shards(folder, _tensors(job, weights), limit_of(weights))
    return [copy_config(weights, folder, quantization_config=said), *files]


def _plain(job: Export, layer: LayerSpec) -> Scheme:
    scheme = job.plan.layers[layer.name]
    return Scheme(scheme.format, scheme.group, scheme.activation, scheme.grain)


def _tensors(job: Export, weights: Weights) -> Iterator[dict[str, Tensor]]:
    return replaced(
        weights,
        {
            key(layer): partial(packed, job, layer)
            for layer in job.graph
            if _plain(job, layer) != KEEP
        },
    )


def packed(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    """The tensors in which the tool holds a layer's weight."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scheme, shape, kind = _plain(job, layer), layer.weight_shape, layout(_plain(job, layer))
    at = f"{layer.name}."
    if scheme.format in BLOCKS:
        code, level = coded(job, layer, weight), rows(job, layer, weight).level.reshape(shape)
        whole = (
            {f"{at}weight_packed": pack_fp4_to_uint8(level)}
            if scheme.bits == 4
            else {f"{at}weight": level.to(torch.float8_e4m3fn)}
        )
        if BLOCKS[scheme.format][3]:
            one = torch.tensor([1 / code.unit])
            return whole | {
                f"{at}weight_scale": code.scale[..., 0].to(torch.float8_e4m3fn),
                f"{at}weight_global_scale": one,
            }
        return whole | {f"{at}weight_scale": (code.scale[..., 0].log2() + 127).to(torch.uint8)}
    made = rows(job, layer, weight)
    level, scale = made.level.reshape(shape), made.scale.to(weight.dtype)
    if scheme.family == "float":
        return {f"{at}weight": level.to(torch.float8_e4m3fn), f"{at}weight_scale": scale}
    half = 2 ** (scheme.bits - 1) if scheme.family == "uint" else 0
    signed = (level - half).to(torch.int8)
    if kind == "int-quantized":
        return {f"{at}weight": signed, f"{at}weight_scale": scale}
    held = {
        f"{at}weight_packed": pack_to_int32(signed, scheme.bits),
        f"{at}weight_scale": scale,
        f"{at}weight_shape": torch.tensor(shape),
    }
    if scheme.family == "uint":
        held[f"{at}weight_zero_point"] = pack_to_int32(
            (made.zero - half).to(torch.int8), scheme.bits, packed_dim=0
        )
    return held


def shapes(scheme: Scheme, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Name after the layer's -> shape of each tensor that holds its weight."""
    out, width = layer.weight_shape[0], layer.weight_shape[-1]
    groups = width // scheme.group if scheme.group else 1
    if scheme == KEEP or scheme.family == "keep":
        return {layer.parameter: layer.weight_shape}
    if scheme.format in BLOCKS:
        held: dict[str, tuple[int, ...]] = (
            {"weight_packed": (out, width // 2)}
            if scheme.bits == 4
            else {"weight": layer.weight_shape}
        )
        return (
            held
            | {"weight_scale": (out, groups)}
            | ({"weight_global_scale": (1,)} if BLOCKS[scheme.format][3] else {})
        )
    if layout(scheme) != "pack-quantized":
        return {"weight": layer.weight_shape, "weight_scale": (out, groups)}
    held = {
        "weight_packed": (out, -(-width * scheme.bits // 32)),
        "weight_scale": (out, groups),
        "weight_shape": (2,),
    }
    return held | (
        {"weight_zero_point": (-(-out * scheme.bits // 32), groups)}
        if scheme.family == "uint"
        else {}
    )


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The config groups, whose names must be layers, and that the files hold what they say in the
    shapes it takes.
    """
    weights = Weights(folder)
    asked: dict[str, Scheme] = {}
    try:
        for name, group in weights.config["quantization_config"]["config_groups"].items():
            for target in group["targets"]:
                graph.layer(str(target))
                if target in asked:
                    raise QSearchError(
                        f"{folder / 'config.json'} names {target} twice, the second time in {name}"
                    )
                asked[target] = scheme_of(group)
    except MISSHAPEN as error:
        raise ArtifactError(
            f"{folder / 'config.json'} holds no config_groups ({type(error).__name__}: "
            f"{error}); export again"
        ) from error
    made = {layer.name: asked.get(layer.name, KEEP) for layer in graph}
    for layer in graph:
        if made[layer.name] != KEEP and nearest(made[layer.name], layer) != made[layer.name]:
            raise QSearchError(
                f"{folder} says {made[layer.name]} of {layer.name} {layer.weight_shape}, "
                "which the tool can't hold"
            )
        for part, shape in shapes(made[layer.name], layer).items():
            name = f"{layer.name}.{part}"
            if name not in weights.files or weights.shape(name) != shape:
                there = weights.shape(name) if name in weights.files else "nothing"
                raise QSearchError(
                    f"{folder} says {made[layer.name]} of {layer.name}: {name} must be "
                    f"{shape}, there is {there}"
                )
    return made
