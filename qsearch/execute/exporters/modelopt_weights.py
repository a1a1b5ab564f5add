"""ModelOpt's checkpoint with written weights in a diffusers folder: FP8, NVFP4 and 16 bits, layer
by layer, as servers read them.

config.json and `hf_quant_config.json` say the algorithm of every layer: `FP8` (a scale a tensor,
inputs in e4m3 with a static scale), `FP8_PER_CHANNEL_PER_TOKEN` (a scale a channel, inputs a
token), `W4A16_NVFP4` (inputs as they are), `NVFP4` (inputs in blocks too, with a static scale),
`NVFP4_SVD` (the same behind a smoothing, with a low-rank branch that reads the smoothed input). One
algorithm stands for the model, with the layers that it leaves out; several are `MIXED_PRECISION`,
with a list of layers, as ModelOpt itself writes it. The weight of two e2m1 numbers a byte has the
first in the low bits, and its block scales lie as the weight's rows do: vLLM and SGLang put them
into the tiles of tensor cores while they load. Queries, keys and values of one scheme share what is
one for a layer (the tensor's scale, the smoothing, a branch's `svdquant_lora_a`): servers make one
layer of them, and take one of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...core.words import number_of, split_word
from ...decide.constraints import fused
from ...measure.shards import Weights, key
from ..codes import coded, rows
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..one_algorithm import ignored, modules
from ..turned import Turned, turned
from ..weights import Wanted, check_tensors, copy_config, limit_of, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = True
has_steps = False
transforms = ("~lowrank32", "~balance~lowrank32")
CHECKPOINT = "hf_quant_config.json"
#: scheme -> ModelOpt's algorithm
ALGORITHMS = {
    "e4m3-t+ae4m3t": "FP8",
    "e4m3-c+ae4m3": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4": "W4A16_NVFP4",
    "nvfp4+anvfp4": "NVFP4",
}
_SVD = "NVFP4_SVD"
#: what a layer of `NVFP4_SVD` has, in this order
_TRANSFORMS = (("lowrank",), ("balance", "lowrank"))
_BLOCK = 16
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """e4m3 with rounded inputs, a tensor or a channel, nvfp4 with inputs as they are or in its
    blocks, of these with a branch too; of linear layers.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    offers = [text for text in ALGORITHMS if "nvfp4" not in text or divides(_BLOCK, layer)]
    chosen = nearest_of(scheme, layer, map(Scheme.parse, offers))
    names = tuple(split_word(word)[0] for word in scheme.transforms)
    if str(replace(chosen, method="")) != "nvfp4+anvfp4" or names not in _TRANSFORMS:
        return chosen
    able = _rank(scheme) <= min(layer.weight_shape)
    return replace(chosen, transforms=scheme.transforms) if able else chosen


def _rank(scheme: Scheme) -> int:
    """Rank of a scheme's branch; 0 without one."""
    return next((number_of(w) for w in scheme.transforms if split_word(w)[0] == "lowrank"), 0)


def stores_range(scheme: Scheme) -> bool:
    """Whether the file has a static scale of the input though the scheme is dynamic: NVFP4's."""
    return _plain(scheme) == "nvfp4+anvfp4"


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with the plan in it, hf_quant_config.json, and safetensors."""
    weights = job.weights
    chosen = {x.name: s for x in job.graph if (s := job.plan.layers[x.name]) != KEEP}
    rank = max(map(_rank, chosen.values()), default=0)
    kept = [*ignored(job.graph, job.plan.layers), *_others(job.graph, weights)]
    entries = {name: _entry(scheme) for name, scheme in chosen.items()}
    one = next(iter(entries.values()), {})
    if any(entry != one for entry in entries.values()):
        one = {"quant_algo": "MIXED_PRECISION", "quantized_layers": entries}
    branch = {"lora_rank": rank} if rank else {}
    held = {"kv_cache_quant_algo": None, **one, **branch}
    words = {name: list(s.transforms) for name, s in chosen.items() if s.transforms}
    producer = {"name": "qsearch", **({"transforms": words} if words else {})}
    config = {"quant_method": "modelopt", "producer": producer, "ignore": kept, **held}
    groups = _groups(job, weights, rank)
    files = write_shards(folder, groups, limit_of(weights))
    checkpoint = folder / CHECKPOINT
    content = {"producer": producer, "quantization": {**held, "exclude_modules": kept}}
    checkpoint.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [copy_config(weights, folder, quantization_config=config), checkpoint, *files]


def _entry(scheme: Scheme) -> dict[str, Any]:
    algorithm = _SVD if scheme.transforms else ALGORITHMS[_plain(scheme)]
    side = {"group_size": _BLOCK} if "NVFP4" in algorithm else {}
    more = {"has_zero_point": False, "pre_quant_scale": True} if algorithm == _SVD else {}
    return {"quant_algo": algorithm, **side, **more}


def _others(graph: OpGraph, weights: Weights) -> list[str]:
    """What else has a matrix, such as layers that no call reaches: one algorithm for all would
    take them too.
    """
    known = {key(layer) for layer in graph}
    names = (name for name in weights.files if name.endswith(".weight") and name not in known)
    return [name.removesuffix(".weight") for name in names if len(weights.shape(name)) == 2]


def _plain(scheme: Scheme) -> str:
    return str(replace(scheme, method="", transforms=()))


def _groups(job: Export, weights: Weights, rank: int) -> Iterator[dict[str, Tensor]]:
    layers = {key(x): x for x in job.graph if job.plan.layers[x.name] != KEEP}
    together = {n: names for names in fused(job.graph) for n in names if _one(job, names)}
    for name in weights.files:
        if name not in layers:
            yield {name: weights.tensor(name)}
            continue
        layer = layers[name]
        parts = [job.graph.layer(n) for n in together.get(layer.name, (layer.name,))]
        yield _part(job, layer, parts, rank)


def _one(job: Export, names: tuple[str, ...]) -> bool:
    """Whether servers take one scale for these layers, or one smoothing: they have one scheme, and
    no scale a channel.
    """
    first, *others = (job.plan.layers[name] for name in names)
    return first != KEEP and first.group != 0 and all(scheme == first for scheme in others)


def _part(job: Export, layer: LayerSpec, parts: list[LayerSpec], rank: int) -> dict[str, Tensor]:
    """A layer's tensors, from those of the whole that it is a part of."""
    import torch

    whole = packed(job, layer, torch.cat([job.weights.tensor(key(x)) for x in parts]), rank)
    begin = sum(x.weight_shape[0] for x in parts[: parts.index(layer)])
    rows = slice(begin, begin + layer.weight_shape[0])
    cut = ("weight", "weight_scale", "svdquant_lora_b")
    return {
        f"{layer.name}.{name}": held[rows].clone() if name in cut and held.ndim else held
        for name, held in whole.items()
    }


def packed(job: Export, layer: LayerSpec, weight: Tensor, rank: int) -> dict[str, Tensor]:
    """weight, weight_scale, nvfp4's weight_scale_2, input_scale, and of `NVFP4_SVD`
    pre_quant_scale and both factors, filled up with zeros to `rank`.

    Raises:
        QSearchError: a static input scale is wanted, and nothing was calibrated.
    """
    import torch

    scheme = job.plan.layers[layer.name]
    if scheme.format != "nvfp4":
        made = rows(job, layer, weight)
        level = made.level.reshape(weight.shape).to(torch.float8_e4m3fn)
        if scheme.group == 0:
            return {"weight": level, "weight_scale": made.scale.float()}
        scale = made.scale.reshape(()).float()
        side = _input_scale(job, layer, _E4M3_MAX, torch.ones(()))
        return {"weight": level, "weight_scale": scale, **side}
    behind = turned(job, layer, weight)
    code = coded(behind.job, layer, behind.weight)
    nibble = code.codes.reshape(weight.shape)
    held = {
        "weight": nibble[:, ::2] | (nibble[:, 1::2] << 4),
        "weight_scale": code.scale[..., 0].to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(float(code.unit)),
    }
    smooth = torch.ones(weight.shape[1])
    if scheme.transforms:
        smooth, more = _branch(behind, rank)
        held |= more
    if scheme.activation:
        held |= _input_scale(job, layer, _E4M3_MAX * _E2M1_MAX, smooth)
    return held


def _branch(behind: Turned, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What the input is multiplied by, and the tensors of `NVFP4_SVD`."""
    import torch

    from ...choices.transforms.lowrank import Branch

    outputs, channels = behind.weight.shape
    smooth = torch.ones(channels)
    down, up = torch.zeros(rank, channels), torch.zeros(outputs, rank)
    for step in behind.steps:
        if isinstance(step, Branch):
            down[: len(step.down)], up[:, : len(step.down)] = step.down, step.up
        else:
            smooth = step.input(torch.ones(1, channels), -1)[0]
    half = torch.float16
    tensors = {"svdquant_lora_a": down.to(half), "svdquant_lora_b": up.to(half)}
    return smooth, {"pre_quant_scale": smooth, **tensors}


def _input_scale(job: Export, layer: LayerSpec, top: float, smooth: Tensor) -> dict[str, Tensor]:
    """The static scale of an input, times `smooth`, whose largest magnitude becomes `top`."""
    import torch

    seen = job.calibration.get(layer.name)
    if seen is None:
        raise QSearchError(
            f"{job.plan.layers[layer.name]} of {layer.name} has a static input scale: export with "
            "calibration"
        )
    largest = (torch.maximum(seen.low.abs(), seen.high.abs()) * smooth).max()
    return {"input_scale": (largest / top).float().reshape(())}


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The configuration's layers, and that the tensors have the types and shapes of their
    algorithms.
    """
    weights = Weights(folder)
    try:
        held = weights.config["quantization_config"]
        beside = json.loads((folder / CHECKPOINT).read_text(encoding="utf-8"))["quantization"]
        said, other = (_said(one, graph, weights) for one in (held, beside))
        words = {n: tuple(map(str, w)) for n, w in held["producer"].get("transforms", {}).items()}
        rank = int(held.get("lora_rank", 0))
    except (OSError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{folder} holds no configuration of ModelOpt's ({type(error).__name__}: {error}); "
            "export again"
        ) from error
    if other != said:
        raise QSearchError(f"{folder}: config.json and {CHECKPOINT} differ; export again")
    forms = {algorithm: text for text, algorithm in ALGORITHMS.items()} | {_SVD: "nvfp4+anvfp4"}
    made = {layer.name: KEEP for layer in graph}
    for name, algorithm in said.items():
        if algorithm not in forms:
            raise QSearchError(
                f"{folder}: no scheme means {algorithm} of {name}; known: {', '.join(forms)}"
            )
        layer = graph.layer(name)
        made[name] = Scheme.parse("~".join((forms[algorithm], *words.get(name, ()))))
        if (algorithm == _SVD) != bool(made[name].transforms) or _rank(made[name]) > rank:
            raise QSearchError(
                f"{folder} says {made[name]} of {name}, and {algorithm} of rank {rank}"
            )
        check_tensors(weights, _tensors(layer, made[name], rank))
    for layer in graph:
        scales = f"{layer.name}.weight_scale" in weights.files
        if scales != (made[layer.name] != KEEP):
            raise QSearchError(
                f"{folder} says {made[layer.name]} of {layer.name}, and its weights say otherwise"
            )
    return made


def _said(held: dict[str, Any], graph: OpGraph, weights: Weights) -> dict[str, str]:
    """Layer -> algorithm, of layers that are quantized."""
    if "quantized_layers" in held:
        return {str(n): str(entry["quant_algo"]) for n, entry in held["quantized_layers"].items()}
    kept = {str(name) for name in held["ignore" if "ignore" in held else "exclude_modules"]}
    own = modules(graph)
    known = {*_others(graph, weights), *own, *own.values()}
    for name in sorted(kept - known):
        graph.layer(name)  # which says what it has instead
    if "quant_algo" not in held:
        return {}
    named = str(held["quant_algo"])
    return {name: named for name, module in own.items() if not {name, module} & kept}


def _tensors(layer: LayerSpec, scheme: Scheme, rank: int) -> Wanted:
    """What the file holds of a layer."""
    out, width = layer.weight_shape
    name = f"{layer.name}.weight"
    side = {f"{layer.name}.input_scale": ((), ("F32",))}
    if scheme.format == "nvfp4":
        branch: Wanted = {
            f"{layer.name}.pre_quant_scale": ((width,), ("F32",)),
            f"{layer.name}.svdquant_lora_a": ((rank, width), ("F16",)),
            f"{layer.name}.svdquant_lora_b": ((out, rank), ("F16",)),
        }
        return {
            name: ((out, width // 2), ("U8",)),
            f"{name}_scale": ((out, width // _BLOCK), ("F8_E4M3",)),
            f"{name}_scale_2": ((), ("F32",)),
            **(side if scheme.activation else {}),
            **(branch if scheme.transforms else {}),
        }
    held = {name: ((out, width), ("F8_E4M3",))}
    if scheme.group == 0:
        return {**held, f"{name}_scale": ((out, 1), ("F32",))}
    return {**held, f"{name}_scale": ((), ("F32",)), **side}
