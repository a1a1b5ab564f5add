"""AutoRound: a checkpoint in its GPTQ-like packing with bits, group and symmetry of each layer in
`extra_config`, which diffusers' AutoRoundConfig loads.

Every linear layer has an entry of its own under its full name, kept ones with 16 bits, so that no
default and no pattern decides. Codes lie in `qweight` along the inputs, 32 bits a word, zero points
in `qzeros` as they are (packing format `auto_round`, not GPTQ's minus one), scales in fp16. The
tool tunes formats beyond integers too, but can't load them mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import Weights, key
from ..codes import rows
from ..exporting import Export
from ..nearest import divides, whole
from ..nearest import nearest as nearest_of
from ..weights import copy_config, limit_of, replaced, write_shards

if TYPE_CHECKING:
    from torch import Tensor

needs: tuple[str, ...] = ()
writes_weights = True
fuses = False
has_steps = False
loading = """
import torch
from diffusers import {kind}

model = {kind}.from_pretrained("{repository}", torch_dtype=torch.float16)
"""
takes: tuple[str, ...] = ("denoiser",)
BITS = (2, 4, 8)
WORD = 32


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Integers of 2, 4 or 8 bits a channel or in groups, of linear layers whose sides 32
    divides.
    """
    if layer.kind != "linear" or layer.parts or any(n % WORD for n in layer.weight_shape):
        return nearest_of(scheme, layer, [])
    sizes = [
        "c",
        *(
            f"g{g}"
            for g in sorted({16, 32, 64, 128, 256, *([scheme.group] if scheme.group > 0 else [])})
            if divides(g, layer)
        ),
    ]
    return nearest_of(
        whole(scheme),
        layer,
        [
            Scheme.parse(f"{sign}{bits}-{size}")
            for sign in ("int", "uint")
            for bits in BITS
            for size in sizes
        ],
    )


def entry(scheme: Scheme) -> dict[str, Any]:
    """A layer's entry in `extra_config`."""
    if scheme == KEEP:
        return {"bits": 16, "act_bits": 16}
    return {
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "sym": scheme.family == "int",
        "data_type": "int",
        "act_bits": 16,
    }


def scheme_of(said: Any) -> Scheme:
    """The scheme that an entry means. Raises `QSearchError` for one that no scheme here means."""
    try:
        if int(said["bits"]) >= 16:
            return KEEP
        size = int(said["group_size"])
        found = Scheme.parse(
            f"{'int' if said['sym'] else 'uint'}{int(said['bits'])}-"
            f"{'c' if size == -1 else f'g{size}'}"
        )
        if said.get("data_type", "int") != "int" or int(said.get("act_bits") or 16) < 16:
            raise QSearchError(
                f"AutoRound's {said['data_type']} with inputs of {said.get('act_bits')} "
                "bits means no scheme here"
            )
        return found
    except MISSHAPEN as error:
        raise QSearchError(
            "an entry of extra_config has bits, group_size and sym; given "
            f"{str(said)[:80]!r} ({type(error).__name__}: {error})"
        ) from error


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with `quantization_config`, and safetensors with packed layers."""
    weights = job.weights
    entries = {
        layer.name: entry(_plain(job, layer)) for layer in job.graph if layer.kind == "linear"
    }
    said = {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": 4,
        "group_size": -1,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "",
        "extra_config": entries,
    }
    files = write_shards(folder, _tensors(job, weights), limit_of(weights))
    return [copy_config(weights, folder, quantization_config=said), *files]


def _plain(job: Export, layer: LayerSpec) -> Scheme:
    scheme = job.plan.layers[layer.name]
    return Scheme(scheme.format, scheme.group)


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
    """qweight [in / 32 * bits, out], qzeros [groups, out / 32 * bits], scales [groups, out]."""
    scheme, made = _plain(job, layer), rows(job, layer, weight)
    half = 2 ** (scheme.bits - 1) if scheme.family == "int" else 0
    code, zero = made.level.reshape(weight.shape) + half, made.zero + half
    return {
        f"{layer.name}.qweight": _words(code.T.contiguous().T, scheme.bits).T.contiguous(),
        f"{layer.name}.qzeros": _words(zero.T, scheme.bits),
        f"{layer.name}.scales": made.scale.T.half(),
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] codes from 0 -> int32 [rows, n * bits / 32], the first code in the lowest bits."""
    import torch

    each = WORD // bits
    parts = codes.to(torch.int64).reshape(len(codes), -1, each) << (torch.arange(each) * bits)
    word = parts.sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The entries of `extra_config`, whose names must be layers, and that the files hold what they
    say in the shapes it takes.
    """
    weights = Weights(folder)
    try:
        entries = weights.config["quantization_config"]["extra_config"]
        asked = {str(name): scheme_of(said) for name, said in entries.items()}
    except MISSHAPEN as error:
        raise ArtifactError(
            f"{folder / 'config.json'} holds no extra_config ({type(error).__name__}: "
            f"{error}); export again"
        ) from error
    for name in asked:
        graph.layer(name)
    made = {layer.name: asked.get(layer.name, KEEP) for layer in graph}
    for layer in graph:
        scheme = made[layer.name]
        if scheme != KEEP and nearest(scheme, layer) != scheme:
            raise QSearchError(
                f"{folder} says {scheme} of {layer.name} {layer.weight_shape}, which the "
                "tool can't hold"
            )
        for part, shape in _shapes(scheme, layer).items():
            name = f"{layer.name}.{part}"
            if name not in weights.files or weights.shape(name) != shape:
                there = weights.shape(name) if name in weights.files else "nothing"
                raise QSearchError(
                    f"{folder} says {scheme} of {layer.name}: {name} must be {shape}, "
                    f"there is {there}"
                )
    return made


def _shapes(scheme: Scheme, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    if scheme == KEEP:
        return {layer.parameter: layer.weight_shape}
    out, width = layer.weight_shape
    groups = width // scheme.group if scheme.group else 1
    return {
        "qweight": (width // WORD * scheme.bits, out),
        "qzeros": (groups, out // WORD * scheme.bits),
        "scales": (groups, out),
    }
