"""torchao's tensors in a diffusers folder, with an `FqnToConfig` of exact names: `from_pretrained`
loads it, on any device.

Names are exact, never patterns: diffusers sorts a config's keys, and among patterns the first match
wins. torchao stores integers below 8 bits one a byte (`IntxUnpackedToInt8Tensor`), so that their
files are no smaller than those of 8 bits; its packed 4-bit tensors are tied to a device each, and
what rounds inputs beside them does not come back from safetensors (0.18), so that 8-bit tokens go
with 8-bit weights alone. The files hold the codes of the plan's own methods; the config says how
torchao would make codes of that format itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import Weights, key
from ..codes import rows
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..weights import copy_config, limit_of, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs = ("torchao",)
writes_weights = True
fuses = False
has_steps = False
loading = """
import torch
from diffusers import {kind}

model = {kind}.from_pretrained("{repository}", torch_dtype=torch.float16)
"""
takes: tuple[str, ...] = ("denoiser", "text encoder")
GROUPS = (32, 64, 128, 256)


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers: integers of 2 to 8 bits by channel or group, e4m3 and int8 with 8-bit tokens
    by channel.
    """
    if layer.kind != "linear":
        return nearest_of(scheme, layer, [])
    sizes = ["c"] * (not layer.parts) + [
        f"g{n}"
        for n in dict.fromkeys((*GROUPS, max(0, scheme.group)))
        if n >= 2 and divides(n, layer)
    ]
    integers = [
        f"{kind}{bits}-{size}" for kind in ("int", "uint") for bits in range(2, 9) for size in sizes
    ]
    by_channel = [] if layer.parts else ["int8-c+a8", "e4m3-c"]
    return nearest_of(scheme, layer, map(Scheme.parse, [*integers, *by_channel]))


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with the plan in it, and safetensors in torchao's layout."""
    weights = job.weights
    said: dict[str, str] = {}
    names = json.dumps(list(weights.files))

    def metadata(_: Iterable[str]) -> dict[str, str]:
        out = {
            **said,
            "tensor_names": names,
        }  # diffusers merges the headers of shards, and the last list of names wins
        said.clear()
        return out

    files = write_shards(
        folder, _groups(job, weights, said), limit_of(weights), metadata, weights.stem
    )
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig

    chosen = {
        layer.name: config(scheme)
        for layer in job.graph
        if (scheme := job.plan.layers[layer.name]) != KEEP
    }
    said_config = {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(FqnToConfig(chosen))},
        "modules_to_not_convert": None,
    }
    return [copy_config(weights, folder, quantization_config=said_config), *files]


def _groups(job: Export, weights: Weights, said: dict[str, str]) -> Iterator[dict[str, Tensor]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    layers = {key(layer): layer for layer in job.graph if job.plan.layers[layer.name] != KEEP}
    for name in weights.files:
        held = weights.tensor(name)
        flat, header = flatten_tensor_state_dict(
            {name: tensor(job, layers[name], held) if name in layers else held}
        )
        said.update({k: v for k, v in header.items() if k != "tensor_names"})
        yield flat


def tensor(job: Export, layer: LayerSpec, weight: Tensor) -> Any:
    """A layer's weight as the tensor of torchao that its scheme means."""
    import torch
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
        Int8Tensor,
        QuantizeTensorToInt8Kwargs,
    )
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
    )

    scheme, made = job.plan.layers[layer.name], rows(job, layer, weight)
    level = made.level.reshape(weight.shape)
    block = [1, weight.shape[1] // made.scale.shape[1]]
    if scheme.family == "float":
        return Float8Tensor(level.to(torch.float8_e4m3fn), made.scale, block, dtype=weight.dtype)
    if _plain_int8(scheme):
        kwargs = QuantizeTensorToInt8Kwargs(**_tokens()) if scheme.activation else None
        return Int8Tensor(
            level.to(torch.int8), made.scale, block, weight.dtype, act_quant_kwargs=kwargs
        )
    half = 0 if scheme.family == "int" else 2 ** (scheme.bits - 1)
    codes, zero = (level - half).to(torch.int8), made.zero - half
    whole = bool((zero == zero.round()).all())  # min-max has whole zero points, hqq has not
    return IntxUnpackedToInt8Tensor(
        codes,
        made.scale,
        zero.to(torch.int8) if whole else zero,
        getattr(torch, f"int{scheme.bits}"),
        tuple(block),
        weight.dtype,
        None,
    )


def _plain_int8(scheme: Scheme) -> bool:
    """What torchao has integer kernels for."""
    return scheme.format == "int8" and scheme.group == 0


def _tokens() -> dict[str, Any]:
    from torchao.quantization import MappingType, PerRow

    return {"granularity": PerRow(), "mapping_type": MappingType.ASYMMETRIC}


def config(scheme: Scheme) -> Any:
    """The configuration by which torchao itself makes this format."""
    import torch
    from torchao import quantization as ao

    if scheme.family == "float":
        return ao.Float8WeightOnlyConfig()
    if _plain_int8(scheme):
        return (
            ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ao.MappingType.ASYMMETRIC)
            if scheme.activation
            else ao.Int8WeightOnlyConfig()
        )
    return ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"),
        granularity=ao.PerGroup(scheme.group) if scheme.group else ao.PerAxis(0),
        mapping_type=ao.MappingType.SYMMETRIC
        if scheme.family == "int"
        else ao.MappingType.ASYMMETRIC,
    )


def scheme_of(config: Any) -> Scheme:
    """The scheme that a configuration of torchao's means, as plain data. Raises `QSearchError` for
    one that no scheme here means.
    """
    try:
        kind, data = config["_type"], config["_data"]
        if kind == "Float8WeightOnlyConfig":
            return Scheme.parse("e4m3-c")
        if kind in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
            return Scheme.parse("int8-c" if kind == "Int8WeightOnlyConfig" else "int8-c+a8")
        if kind in ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"):
            inputs, prefix = ("", "") if kind == "IntxWeightOnlyConfig" else ("+a8", "weight_")
            grain = data[f"{prefix}granularity"]
            size = f"g{grain['_data']['group_size']}" if grain["_type"] == "PerGroup" else "c"
            sign = "int" if data[f"{prefix}mapping_type"]["_data"] == "SYMMETRIC" else "uint"
            return Scheme.parse(
                f"{sign}{data['weight_dtype']['_data'].removeprefix('int')}-{size}{inputs}"
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise QSearchError(
            "a configuration of torchao's has _type and _data; given "
            f"{str(config)[:80]!r} ({type(error).__name__}: {error})"
        ) from error
    raise QSearchError(f"torchao's {kind} means no scheme here")


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The configuration's names, and that the tensors in the files are of those formats."""
    weights = Weights(folder)
    try:
        entries = weights.config["quantization_config"]["quant_type"]["default"]["_data"][
            "fqn_to_config"
        ]
        asked = {str(name): scheme_of(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / 'config.json'} holds no FqnToConfig ({type(error).__name__}: "
            f"{error}); export again"
        ) from error
    for name in asked:
        graph.layer(name)
    kinds = _kinds(weights)
    made = {layer.name: asked.get(layer.name, KEEP) for layer in graph}
    for layer in graph:
        wanted = _kind(made[layer.name])
        if kinds.get(key(layer)) != wanted:
            raise QSearchError(
                f"{folder} says {made[layer.name]} of {layer.name}, and holds it as "
                f"{kinds.get(key(layer))} instead of {wanted}"
            )
    return made


def _kind(scheme: Scheme) -> str:
    if scheme == KEEP:
        return "Tensor"
    if scheme.family == "float":
        return "Float8Tensor"
    return "Int8Tensor" if _plain_int8(scheme) else f"IntxUnpackedToInt8Tensor int{scheme.bits}"


def _kinds(weights: Weights) -> dict[str, str]:
    from safetensors import safe_open

    found = {}
    for path in sorted(set(weights.files.values())):
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        for name, text in header.items():
            if name not in ("format", "tensor_names"):
                entry = json.loads(text)
                target = (entry.get("_data") or {}).get("target_dtype")
                found[name] = str(entry.get("_type")) + (f" {target['_data']}" if target else "")
    return found
