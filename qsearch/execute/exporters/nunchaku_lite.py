"""Nunchaku Lite's checkpoints for diffusers: each layer in SVDQuant's 4-bit weights and inputs
with a low-rank branch in 16 bits, in AWQ's 4-bit weights, or in 16 bits.

`int4-g64+aint4g64`, with `~balance` and `~lowrankN` or without, is `svdq_w4a4`: its kernel smooths
the input, rounds it symmetrically in groups of 64 and adds the branch, which reads the input as it
was; `nvfp4+anvfp4` is the same in NVFP4's blocks of 16. `uint4-g64` is `awq_w4a16`. One precision
and one rank serve a whole model: smaller branches are filled up with zeros. Scales and branches are
in the model's type, bfloat16 or else float16, as its kernels read them. Rows and columns are
multiples of 128 (AWQ: of 4 and 64), and names are the model's own, since diffusers reads all of
these keys and no others; fused queries, keys and values are not its layout. To run it takes an
NVIDIA GPU from Turing to Ada, or Blackwell for NVFP4. How a layer was smoothed is said beside its
targets, in `transforms`, which diffusers does not read. A plan that keeps all layers is a plain
checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...core.words import number_of, split_word
from ...measure.shards import Weights, key
from ..codes import coded, rows
from ..exporting import Export
from ..nearest import nearest as nearest_of
from ..turned import turned
from ..weights import Wanted, check_tensors, copy_config, limit_of, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = False
has_steps = False
transforms = ("~balance", "~lowrank32", "~balance~lowrank32")
loading = """
import torch
from diffusers import {kind}

model = {kind}.from_pretrained("{repository}", torch_dtype=torch.bfloat16)
"""
takes: tuple[str, ...] = ("denoiser",)
SVDQ, AWQ = Scheme.parse("int4-g64+aint4g64"), Scheme.parse("uint4-g64")
NVFP4 = Scheme.parse("nvfp4+anvfp4")
#: of `svdq_w4a4`, which has one precision for a model
either = tuple(scheme.format for scheme in (SVDQ, NVFP4))
#: what `svdq_w4a4` calls its precisions
_PRECISIONS = {"int4": SVDQ, "nvfp4": NVFP4}
#: what a layer of SVDQuant may have, in this order
_TRANSFORMS = ((), ("balance",), ("lowrank",), ("balance", "lowrank"))
_GROUP = 64
_TILE = 128
#: entries of a branch's rank that its kernel takes at a time, and the least rank
_RANK = 16
_SCALES = ("F16", "BF16")
#: the least exponent of a normal number of fp16
_LEAST = -14


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """4-bit weights with 4-bit inputs, integers or NVFP4, smoothed and with a branch as the scheme
    says, or 4-bit weights alone; of linear layers whose sizes its tiles divide.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    outputs, channels = layer.weight_shape
    offers = [SVDQ, NVFP4] if outputs % _TILE == 0 == channels % _TILE else []
    offers += [AWQ] if outputs % 4 == 0 == channels % _GROUP else []
    chosen = nearest_of(scheme, layer, offers)
    names = tuple(split_word(word)[0] for word in scheme.transforms)
    return replace(chosen, transforms=scheme.transforms) if _branch(chosen, names) else chosen


def _branch(scheme: Scheme, names: tuple[str, ...]) -> bool:
    return replace(scheme, method="") in (SVDQ, NVFP4) and names in _TRANSFORMS


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with `quantization_config`, and safetensors in the kernels' layout."""
    import torch

    weights = job.weights
    chosen = {layer.name: job.plan.layers[layer.name] for layer in job.graph}
    layers = {key(x): x for x in job.graph if chosen[x.name] != KEEP}
    held = {x.name: _plain(chosen[x.name]) for x in layers.values()}
    svdq = [name for name, scheme in held.items() if scheme != AWQ]
    precisions = sorted({held[name].format for name in svdq})
    if len(precisions) > 1:
        counts = [f"{sum(held[n].format == p for n in svdq)} layers {p}" for p in precisions]
        raise QSearchError(
            f"one precision serves a whole model of Nunchaku Lite, and the plan has "
            f"{' and '.join(counts)}: allocate with schemes of one of them"
        )
    awq = [name for name, scheme in held.items() if scheme == AWQ]
    stored = {weights.dtype(name) for name in layers}
    dtype = torch.bfloat16 if stored == {"BF16"} else torch.float16
    ranks = [_rank(chosen[name]) for name in svdq]
    rank = max([_RANK, *ranks])
    config: dict[str, Any] = {"quant_method": "nunchaku_lite"}
    config["compute_dtype"] = str(dtype).removeprefix("torch.")
    if svdq:
        config["svdq_w4a4"] = {
            "precision": precisions[0],
            "group_size": _PRECISIONS[precisions[0]].group,
            "rank": rank,
            "targets": svdq,
            "transforms": {n: list(chosen[n].transforms) for n in svdq if chosen[n].transforms},
        }
    if awq:
        config["awq_w4a16"] = {"precision": "int4", "group_size": _GROUP, "targets": awq}
    groups = _groups(job, weights, layers, rank, dtype)
    files = write_shards(folder, groups, limit_of(weights), stem=weights.stem)
    more = {"quantization_config": config} if held else {}
    return [copy_config(weights, folder, **more), *files]


def _plain(scheme: Scheme) -> Scheme:
    """What the file calls a layer by: the scheme without its method and transforms."""
    return replace(scheme, method="", transforms=())


def _rank(scheme: Scheme) -> int:
    """Rank of a scheme's branch; 0 without one."""
    return next((number_of(w) for w in scheme.transforms if split_word(w)[0] == "lowrank"), 0)


def _groups(
    job: Export, weights: Weights, layers: dict[str, LayerSpec], rank: int, dtype: Any
) -> Iterator[dict[str, Tensor]]:
    from ..nunchaku_layout import pack_scales

    packed = {f"{x.name}.bias" for x in layers.values() if _plain(job.plan.layers[x.name]) != AWQ}
    biases = {f"{x.name}.bias" for x in layers.values()}
    for name in weights.files:
        held = weights.tensor(name)
        if name in layers:
            yield _tensors(job, layers[name], held, rank, dtype)
        elif name in biases:
            held = held.to(dtype)
            yield {name: pack_scales(held) if name in packed else held}
        else:
            yield {name: held}


def _tensors(
    job: Export, layer: LayerSpec, weight: Tensor, rank: int, dtype: Any
) -> dict[str, Tensor]:
    import torch

    from ...choices.transforms.lowrank import Branch
    from .. import nunchaku_layout as layout

    scheme, name = job.plan.layers[layer.name], layer.name
    if scheme.format == AWQ.format:
        made = rows(job, layer, weight)
        return {
            f"{name}.qweight": layout.pack_awq(made.level.flatten(1)),
            f"{name}.wscales": made.scale.T.to(dtype),
            f"{name}.wzeros": (-made.scale * made.zero).T.to(dtype),
        }
    behind = turned(job, layer, weight)
    outputs, channels = weight.shape
    down, up = torch.zeros(rank, channels), torch.zeros(outputs, rank)
    divisor = torch.ones(channels)
    for step in behind.steps:
        if isinstance(step, Branch):
            down[: len(step.down)], up[:, : len(step.down)] = step.down, step.up
        else:
            divisor = 1 / step.input(torch.ones(1, channels), -1)[0]
    return {
        **_codes(behind.job, layer, behind.weight, dtype),
        f"{name}.smooth_factor": layout.pack_scales(divisor.to(dtype)),
        f"{name}.proj_down": layout.pack_down((down / divisor).to(dtype)),
        f"{name}.proj_up": layout.pack_up(up.to(dtype)),
    }


def _codes(job: Export, layer: LayerSpec, weight: Tensor, dtype: Any) -> dict[str, Tensor]:
    """Codes and scales; of NVFP4 the tensor's scale too, as a power of two that the smallest type
    holds, and what is left of it for each row.
    """
    import torch

    from .. import nunchaku_layout as layout

    name = layer.name
    if job.plan.layers[name].format != NVFP4.format:
        made = rows(job, layer, weight)
        return {
            f"{name}.qweight": layout.pack_codes(made.level.flatten(1)),
            f"{name}.wscales": layout.pack_scales(made.scale.to(dtype)),
        }
    code = coded(job, layer, weight)
    power = 2.0 ** max(_LEAST, math.frexp(code.unit)[1] - 1)
    scales = code.scale[..., 0].to(torch.float8_e4m3fn).view(torch.uint8)
    return {
        f"{name}.qweight": layout.pack_codes(code.codes.flatten(1)),
        f"{name}.wscales": layout.pack_micro(scales).view(torch.float8_e4m3fn),
        f"{name}.wtscale": torch.tensor([power], dtype=dtype),
        f"{name}.wcscales": torch.full((len(weight),), code.unit / power, dtype=dtype),
    }


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The targets of the configuration, and that the files hold their tensors in the shapes that
    diffusers makes for them.
    """
    weights = Weights(folder)
    try:
        config = weights.config.get("quantization_config", {"quant_method": "nunchaku_lite"})
        if config["quant_method"] != "nunchaku_lite":
            raise ValueError(f"quant_method {config['quant_method']!r}")
        svdq, awq = config.get("svdq_w4a4") or {}, config.get("awq_w4a16") or {}
        plain = _PRECISIONS[svdq.get("precision", "int4")]
        rank, said = int(svdq.get("rank", 0)), dict(svdq.get("transforms", {}))
        targets = [*svdq.get("targets", ())], [*awq.get("targets", ())]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / 'config.json'} holds no configuration of nunchaku_lite's "
            f"({type(error).__name__}: {error}); export again"
        ) from error
    made = {layer.name: KEEP for layer in graph}
    for name in targets[0]:
        layer = graph.layer(name)
        scheme = Scheme.parse(str(plain) + "".join(f"~{word}" for word in said.get(name, ())))
        check_tensors(weights, _svdq_tensors(layer, plain, rank))
        if _rank(scheme) > rank:
            raise QSearchError(f"{folder} says {scheme} of {name}, and its rank is {rank}")
        made[name] = scheme
    for name in targets[1]:
        check_tensors(weights, _awq_tensors(graph.layer(name)))
        made[name] = AWQ
    for layer in graph:
        kept = made[layer.name] == KEEP
        if kept != (key(layer) in weights.files) or kept == (
            f"{layer.name}.qweight" in weights.files
        ):
            raise QSearchError(
                f"{folder} says {made[layer.name]} of {layer.name}, and its weights say otherwise"
            )
    return made


def _svdq_tensors(layer: LayerSpec, scheme: Scheme, rank: int) -> Wanted:
    outputs, channels = layer.weight_shape
    side = (channels // scheme.group, outputs)
    parts = {
        "qweight": ((outputs, channels // 2), ("I8",)),
        "wscales": (side, _SCALES if scheme == SVDQ else ("F8_E4M3",)),
        "smooth_factor": ((channels,), _SCALES),
        "proj_down": ((channels, rank), _SCALES),
        "proj_up": ((outputs, rank), _SCALES),
    }
    if scheme == NVFP4:
        parts |= {"wcscales": ((outputs,), _SCALES), "wtscale": ((1,), _SCALES)}
    return {f"{layer.name}.{part}": held for part, held in parts.items()}


def _awq_tensors(layer: LayerSpec) -> Wanted:
    outputs, channels = layer.weight_shape
    side = (channels // _GROUP, outputs), _SCALES
    return {
        f"{layer.name}.qweight": ((outputs // 4, channels // 2), ("I32",)),
        f"{layer.name}.wscales": side,
        f"{layer.name}.wzeros": side,
    }
