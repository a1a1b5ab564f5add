"""SDNQ's weights in a diffusers folder: below 8 bits, packed, for linear layers and convolutions,
on any device that torch supports.

Every quantized weight is named whole, with `.weight`, in `modules_quant_config`, and every other in
`modules_to_not_convert`: a name without the ending matches nothing in SDNQ and would be passed over
in silence. Convolutions have a scale for each position of the kernel there; ours has one for the
whole row, which is written at every position.

`~rotate` is `use_hadamard` (the same matrices), `~lowrankN` is `use_svd` (the branch that measuring
fitted, in fp32), in that order, on linear layers whose inputs are left alone. The weight is
dequantized with both undone, so that nothing is rotated at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...core.words import number_of, split_word
from ...measure.shards import Weights, key
from ..codes import rows
from ..exporting import Export
from ..nearest import divides, width
from ..nearest import nearest as nearest_of
from ..turned import rotation_word, turned
from ..weights import copy_config, limit_of, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs = ("sdnq",)
writes_weights = True
fuses = False
has_steps = False
transforms = ("~rotate", "~lowrank32", "~rotate~lowrank32")
loading = """
import sdnq  # before diffusers looks for it
import torch
from diffusers import {kind}

model = {kind}.from_pretrained("{repository}", torch_dtype=torch.bfloat16)
"""
takes: tuple[str, ...] = ("denoiser", "vae")
GROUPS = (16, 32, 64, 128, 256)
#: transforms that SDNQ has, in its order
_TRANSFORMS = (("rotate",), ("lowrank",), ("rotate", "lowrank"))
_FLOATS = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e2m1": "float4_e2m1fn",
    "e1m2": "float4_e1m2fn",
    "e3m0": "float4_e3m0fn",
}
TYPES = {
    f"{kind}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in range(2, 9)
} | _FLOATS


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers and convolutions: integers of 2 to 8 bits and small floats, by channel; by
    group where the kernel is a point; linear layers rotated, with a branch.
    """
    if _transforms(scheme, layer):
        plain = nearest(replace(scheme, transforms=()), layer)
        return plain if plain == KEEP else replace(plain, transforms=_spelt(scheme, layer))
    if layer.kind not in ("linear", "conv2d"):
        return nearest_of(scheme, layer, [])
    sizes = [] if layer.parts else [0]
    if layer.weights == layer.weight_shape[0] * layer.weight_shape[1]:
        sizes += [
            n
            for n in dict.fromkeys((*GROUPS, max(0, scheme.group)))
            if 1 < n < width(layer) and divides(n, layer)
        ]
    return nearest_of(scheme, layer, [Scheme(form, size) for form in TYPES for size in sizes])


def _transforms(scheme: Scheme, layer: LayerSpec) -> bool:
    """Whether SDNQ has the scheme's transforms for this layer."""
    names = tuple(split_word(word)[0] for word in scheme.transforms)
    if names not in _TRANSFORMS or layer.kind != "linear" or layer.parts or scheme.activation:
        return False
    channels, rank = layer.weight_shape[1], dict(zip(names, scheme.transforms, strict=True))
    if "rotate" in rank and channels % (number_of(rank["rotate"]) or 16):
        return False
    return "lowrank" not in rank or number_of(rank["lowrank"]) <= min(layer.weight_shape)


def _spelt(scheme: Scheme, layer: LayerSpec) -> tuple[str, ...]:
    """The transforms as reading spells them: a rotation of the largest group without its number."""
    return tuple(
        rotation_word(number_of(word), layer) if split_word(word)[0] == "rotate" else word
        for word in scheme.transforms
    )


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with the plan in it, and safetensors in SDNQ's layout."""
    from sdnq import SDNQConfig

    weights = job.weights
    layers = {key(layer): layer for layer in job.graph if job.plan.layers[layer.name] != KEEP}
    chosen = {name: _settings(job.plan.layers[layer.name], layer) for name, layer in layers.items()}
    kept = sorted(name for name in weights.files if name.endswith(".weight") and name not in layers)
    config = SDNQConfig(
        quant_conv=True,
        add_skip_keys=False,
        modules_quant_config=chosen,
        modules_to_not_convert=kept,
    ).to_dict()
    config |= {"quant_method": "sdnq", "modules_to_not_convert": kept}
    files = write_shards(
        folder, _groups(job, weights, layers), limit_of(weights), stem=weights.stem
    )
    return [copy_config(weights, folder, quantization_config=config), *files]


def _settings(scheme: Scheme, layer: LayerSpec) -> dict[str, Any]:
    from ...choices.hadamard import group_of

    found = {"weights_dtype": TYPES[scheme.format], "group_size": scheme.group or -1}
    for word in scheme.transforms:
        name, number = split_word(word)[0], number_of(word)
        if name == "rotate":
            size = group_of(layer.weight_shape[1], number)
            found |= {"use_hadamard": True, "hadamard_group_size": size}
        else:
            found |= {"use_svd": True, "svd_rank": number}
    return found


def _groups(
    job: Export, weights: Weights, layers: dict[str, LayerSpec]
) -> Iterator[dict[str, Tensor]]:
    for name in weights.files:
        held = weights.tensor(name)
        yield _tensors(job, layers[name], held) if name in layers else {name: held}


def _tensors(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    from sdnq.common import dtype_dict
    from sdnq.packed_float import pack_float
    from sdnq.packed_int import pack_int

    from ...choices.transforms.lowrank import Branch

    scheme = job.plan.layers[layer.name]
    branch: dict[str, Tensor] = {}
    if scheme.transforms:
        behind = turned(job, layer, weight)
        job, weight = behind.job, behind.weight
        for step in behind.steps:
            if isinstance(step, Branch):
                up, down = step.up.contiguous(), step.down.contiguous()
                branch = {f"{layer.name}.svd_up": up, f"{layer.name}.svd_down": down}
    made = rows(job, layer, weight)
    kind, taps = TYPES[scheme.format], weight.shape[2:]
    groups = made.scale.shape[1]
    shape = (
        weight.shape if groups == 1 else (weight.shape[0], groups, weight.shape[1] // groups, *taps)
    )
    level = made.level.reshape(shape)
    if dtype_dict[kind]["is_packed"]:
        data = (pack_int if dtype_dict[kind]["is_integer"] else pack_float)(
            level.to(dtype_dict[kind]["torch_dtype"]), kind
        )
    else:
        data = level.to(dtype_dict[kind]["torch_dtype"])
    spread = (shape[0], *([1] if groups == 1 else [groups, 1]), *[1] * len(taps))
    tensors = {key(layer): data, f"{layer.name}.scale": _each(made.scale.reshape(spread), taps)}
    if scheme.family == "uint":
        tensors[f"{layer.name}.zero_point"] = _each((-made.scale * made.zero).reshape(spread), taps)
    return tensors | branch


def _each(scale: Tensor, taps: tuple[int, ...]) -> Tensor:
    return scale.expand(*scale.shape[: scale.ndim - len(taps)], *taps).clone()


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The configuration's names, and that the files hold a scale for each of them and for no other
    layer.
    """
    weights = Weights(folder)
    try:
        config = weights.config["quantization_config"]
        chosen = {
            str(name): (str(entry["weights_dtype"]), int(entry["group_size"]), dict(entry))
            for name, entry in config["modules_quant_config"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / 'config.json'} holds no configuration of SDNQ's "
            f"({type(error).__name__}: {error}); export again"
        ) from error
    forms = {kind: form for form, kind in TYPES.items()}
    made = {layer.name: KEEP for layer in graph}
    for name, (kind, size, entry) in chosen.items():
        layer = graph.layer(name.removesuffix(".weight"))
        if kind not in forms or name != key(layer):
            raise QSearchError(
                f"{folder / 'config.json'} says {kind} of {name}; SDNQ names weights "
                f"whole, and qsearch reads {', '.join(forms)}"
            )
        words = _words(weights, layer, entry)
        made[layer.name] = Scheme(forms[kind], max(0, size), transforms=words)
    for layer in graph:
        if (f"{layer.name}.scale" in weights.files) != (made[layer.name] != KEEP):
            raise QSearchError(
                f"{folder} says {made[layer.name]} of {layer.name}, and its weights say otherwise"
            )
        if (
            made[layer.name] == KEEP
            and layer.kind in ("linear", "conv2d")
            and key(layer) not in config["modules_to_not_convert"]
        ):
            raise QSearchError(
                f"{folder / 'config.json'} keeps {layer.name} and does not name it among "
                "modules_to_not_convert"
            )
    return made


def _words(weights: Weights, layer: LayerSpec, entry: dict[str, Any]) -> tuple[str, ...]:
    """The transforms that a layer's settings say, whose tensors are there."""
    words = []
    if entry.get("use_hadamard"):
        words.append(rotation_word(int(entry["hadamard_group_size"]), layer))
    branch = [f"{layer.name}.svd_{side}" for side in ("up", "down")]
    if bool(entry.get("use_svd")) != all(name in weights.files for name in branch):
        raise QSearchError(
            f"{weights.folder} says use_svd {bool(entry.get('use_svd'))} of {layer.name}, and its "
            "weights say otherwise"
        )
    if entry.get("use_svd"):
        rank = int(entry["svd_rank"])
        shapes = ((layer.weight_shape[0], rank), (rank, layer.weight_shape[1]))
        if tuple(weights.shape(name) for name in branch) != shapes:
            raise QSearchError(
                f"{weights.folder}: the branch of {layer.name} is not of rank {rank}"
            )
        words.append(f"lowrank{rank}")
    return tuple(words)
