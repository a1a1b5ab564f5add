"""ModelOpt's checkpoint with written weights in a diffusers folder: FP8, NVFP4 and 16 bits mixed,
`MIXED_PRECISION`, as servers read them.

config.json and `hf_quant_config.json` name every layer with its algorithm: `FP8` (a scale a tensor,
inputs in e4m3 with a static scale), `FP8_PER_CHANNEL_PER_TOKEN` (a scale a channel, inputs a
token), `W4A16_NVFP4` (inputs as they are), `NVFP4` (inputs in blocks too, with a static scale). The
weight of two e2m1 numbers a byte has the first in
the low bits, and its block scales lie as the weight's rows do: vLLM and SGLang put them into the
tiles of tensor cores while they load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import Weights, key
from ..codes import coded, rows
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..weights import Wanted, check_tensors, copy_config, limit_of, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = True
has_steps = False
CHECKPOINT = "hf_quant_config.json"
#: scheme -> ModelOpt's algorithm
ALGORITHMS = {
    "e4m3-t+ae4m3t": "FP8",
    "e4m3-c+ae4m3": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4": "W4A16_NVFP4",
    "nvfp4+anvfp4": "NVFP4",
}
_BLOCK = 16
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """e4m3 with rounded inputs, a tensor or a channel, and nvfp4 with inputs as they are or in its
    blocks; of linear layers.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    offers = [text for text in ALGORITHMS if "nvfp4" not in text or divides(_BLOCK, layer)]
    return nearest_of(scheme, layer, map(Scheme.parse, offers))


def stores_range(scheme: Scheme) -> bool:
    """Whether the file has a static scale of the input though the scheme is dynamic: NVFP4's."""
    return _plain(scheme) == "nvfp4+anvfp4"


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with the plan in it, hf_quant_config.json, and safetensors."""
    weights = job.weights
    chosen = {x.name: s for x in job.graph if (s := job.plan.layers[x.name]) != KEEP}
    kept = [x.name for x in job.graph if x.name not in chosen and x.kind == "linear"]
    said = {name: _entry(scheme) for name, scheme in chosen.items()}
    held = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": said}
    config = {"quant_method": "modelopt", "producer": {"name": "qsearch"}, "ignore": kept, **held}
    layers = {key(x): x for x in job.graph if x.name in chosen}
    files = write_shards(folder, _groups(job, weights, layers), limit_of(weights))
    checkpoint = folder / CHECKPOINT
    content = {"producer": {"name": "qsearch"}, "quantization": {**held, "exclude_modules": kept}}
    checkpoint.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [copy_config(weights, folder, quantization_config=config), checkpoint, *files]


def _entry(scheme: Scheme) -> dict[str, Any]:
    algorithm = ALGORITHMS[_plain(scheme)]
    return {"quant_algo": algorithm, **({"group_size": _BLOCK} if "NVFP4" in algorithm else {})}


def _plain(scheme: Scheme) -> str:
    return str(scheme).partition("@")[0]


def _groups(
    job: Export, weights: Weights, layers: dict[str, LayerSpec]
) -> Iterator[dict[str, Tensor]]:
    for name in weights.files:
        held = weights.tensor(name)
        yield packed(job, layers[name], held) if name in layers else {name: held}


def packed(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    """weight, weight_scale, nvfp4's weight_scale_2 and FP8's input_scale.

    Raises:
        QSearchError: a static input scale is wanted, and nothing was calibrated.
    """
    import torch

    scheme, name = job.plan.layers[layer.name], f"{layer.name}.weight"
    if scheme.format == "nvfp4":
        code = coded(job, layer, weight)
        nibble = code.codes.reshape(weight.shape)
        return {
            name: nibble[:, ::2] | (nibble[:, 1::2] << 4),
            f"{name}_scale": code.scale[..., 0].to(torch.float8_e4m3fn),
            f"{name}_scale_2": torch.tensor(float(code.unit)),
            **(_input_scale(job, layer, _E4M3_MAX * _E2M1_MAX) if scheme.activation else {}),
        }
    made = rows(job, layer, weight)
    level = made.level.reshape(weight.shape).to(torch.float8_e4m3fn)
    if scheme.group == 0:
        return {name: level, f"{name}_scale": made.scale.float()}
    side = {f"{name}_scale": made.scale.reshape(()).float()}
    return {name: level, **side, **_input_scale(job, layer, _E4M3_MAX)}


def _input_scale(job: Export, layer: LayerSpec, top: float) -> dict[str, Tensor]:
    """The static scale of an input whose largest magnitude becomes `top`."""
    import torch

    seen = job.calibration.get(layer.name)
    if seen is None:
        raise QSearchError(
            f"{job.plan.layers[layer.name]} of {layer.name} has a static input scale: export with "
            "calibration"
        )
    largest = torch.maximum(seen.low.abs().max(), seen.high.abs().max())
    return {f"{layer.name}.input_scale": (largest / top).float().reshape(())}


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The configuration's layers, and that the tensors have the types and shapes of their
    algorithms.
    """
    weights = Weights(folder)
    try:
        said = weights.config["quantization_config"]["quantized_layers"]
        chosen = {str(name): str(entry["quant_algo"]) for name, entry in said.items()}
        beside = json.loads((folder / CHECKPOINT).read_text(encoding="utf-8"))
        other = beside["quantization"]["quantized_layers"]
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{folder} holds no configuration of ModelOpt's ({type(error).__name__}: {error}); "
            "export again"
        ) from error
    if other != said:
        raise QSearchError(f"{folder}: config.json and {CHECKPOINT} differ; export again")
    forms = {algorithm: text for text, algorithm in ALGORITHMS.items()}
    made = {layer.name: KEEP for layer in graph}
    for name, algorithm in chosen.items():
        if algorithm not in forms:
            raise QSearchError(
                f"{folder}: no scheme means {algorithm} of {name}; known: {', '.join(forms)}"
            )
        layer = graph.layer(name)
        made[name] = Scheme.parse(forms[algorithm])
        check_tensors(weights, _tensors(layer, made[name]))
    for layer in graph:
        scales = f"{layer.name}.weight_scale" in weights.files
        if scales != (made[layer.name] != KEEP):
            raise QSearchError(
                f"{folder} says {made[layer.name]} of {layer.name}, and its weights say otherwise"
            )
    return made


def _tensors(layer: LayerSpec, scheme: Scheme) -> Wanted:
    """What the file holds of a layer."""
    out, width = layer.weight_shape
    name = f"{layer.name}.weight"
    side = {f"{layer.name}.input_scale": ((), ("F32",))}
    if scheme.format == "nvfp4":
        return {
            name: ((out, width // 2), ("U8",)),
            f"{name}_scale": ((out, width // _BLOCK), ("F8_E4M3",)),
            f"{name}_scale_2": ((), ("F32",)),
            **(side if scheme.activation else {}),
        }
    held = {name: ((out, width), ("F8_E4M3",))}
    if scheme.group == 0:
        return {**held, f"{name}_scale": ((out, 1), ("F32",))}
    return {**held, f"{name}_scale": ((), ("F32",)), **side}
