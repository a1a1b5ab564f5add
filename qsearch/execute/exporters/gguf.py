"""GGUF with a type for every tensor: loads in diffusers (`from_single_file`), and rules for
stable-diffusion.cpp's own conversion.

The legacy types store what qsearch's integers in groups of 32 are, an fp16 scale and codes, so that
the codes of the plan's methods are packed as they are: Q4_0, Q5_0 and Q8_0 exactly, Q4_1 and Q5_1
but for the product of scale and zero point, which they keep as fp16. Layouts: ggml's `block_q4_0`
to `block_q8_0` (ggml-common.h). K-quants need a packer of their own and are left to llama-quantize;
diffusers reads quantized weights into linear layers alone, so that convolutions are kept.

A weight of five axes (the patch embedding of Wan and other video models) is written with its five
axes, as the files that people pass on have it: diffusers requires them, and the reader of
stable-diffusion.cpp stacks those beyond ggml's four into the fourth. Plain `gguf_init_from_file` of
ggml refuses such a file.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import Weights, key
from ..codes import Rows, rows
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of
from ..weights import copy_config

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

needs = ("gguf",)
writes_weights = True
fuses = False
has_steps = False
loading = """
import torch
from diffusers import {kind}, GGUFQuantizationConfig
from huggingface_hub import snapshot_download

folder = snapshot_download("{repository}")
model = {kind}.from_single_file(
    f"{folder}/model.gguf",
    config=folder,
    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    torch_dtype=torch.bfloat16,
)
"""
takes: tuple[str, ...] = ("denoiser",)
BLOCK = 32
#: type -> scheme
TYPES = {
    "Q4_0": "int4-g32",
    "Q4_1": "uint4-g32",
    "Q5_0": "int5-g32",
    "Q5_1": "uint5-g32",
    "Q8_0": "int8-g32",
}
_PLAIN = ("F32", "F16", "BF16")
FILE, RULES = "model.gguf", "tensor-type-rules.txt"


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Integers of 4, 5 or 8 bits in groups of 32, of linear layers whose rows such groups fill."""
    fits = layer.kind == "linear" and divides(BLOCK, layer)
    return nearest_of(scheme, layer, [Scheme.parse(s) for s in TYPES.values()] if fits else [])


def write(job: Export, folder: Path) -> list[Path]:
    """model.gguf with diffusers' names, its config.json, and the same as rules of
    stable-diffusion.cpp's `--tensor-type-rules`.
    """
    import gguf
    import numpy as np

    weights = job.weights
    layers = {key(layer): layer for layer in job.graph}
    types = {name: _type(job, layers.get(name), weights, name) for name in weights.files}
    writer = gguf.GGUFWriter(folder / FILE, str(weights.config.get("_class_name", "diffusion")))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, kind in types.items():
        raw = getattr(gguf.GGMLQuantizationType, kind)
        block, size = gguf.GGML_QUANT_SIZES[raw]
        shape = weights.shape(name)
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw
        )  # the dtype counts only where there is no raw type
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in types.items():
        writer.write_tensor_data(_data(job, layers.get(name), weights.tensor(name), kind))
    writer.close()
    rules = folder / RULES
    rules.write_text(
        ",".join(
            f"^(.*\\.)?{re.escape(name)}$={kind.lower()}"
            for name, kind in types.items()
            if kind in TYPES
        )
        + "\n",
        encoding="utf-8",
    )
    return [folder / FILE, copy_config(weights, folder), rules]


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """Tensor types as gguf's own reader sees them."""
    import gguf

    try:
        found = {
            tensor.name: tensor.tensor_type.name
            for tensor in gguf.GGUFReader(folder / FILE).tensors
        }
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ArtifactError(
            f"{folder / FILE} is not readable as GGUF ({type(error).__name__}: {error}); "
            "export again"
        ) from error
    made = {}
    for layer in graph:
        kind = found.pop(key(layer), None)
        if kind is None:
            raise QSearchError(
                f"{folder / FILE} has no tensor {key(layer)}, which {graph.model} needs"
            )
        if kind not in (*TYPES, *_PLAIN):
            raise QSearchError(
                f"{key(layer)} has type {kind} in {folder / FILE}, which no scheme means"
            )
        made[layer.name] = Scheme.parse(TYPES[kind]) if kind in TYPES else KEEP
    for name, kind in found.items():
        if kind not in _PLAIN:
            raise QSearchError(
                f"{folder / FILE} quantizes {name}, which is no layer of {graph.model}"
            )
    return made


def _type(job: Export, layer: LayerSpec | None, weights: Weights, name: str) -> str:
    scheme = KEEP if layer is None else job.plan.layers[layer.name]
    if scheme != KEEP:
        return {text: kind for kind, text in TYPES.items()}[
            str(Scheme(scheme.format, scheme.group))
        ]
    kept = {"F16": "F16", "BF16": "BF16"}.get(weights.dtype(name), "F32")
    # diffusers unpacks bf16 in linear layers alone; fp32 holds every bf16 number.
    return kept if kept != "BF16" or (layer is not None and layer.kind == "linear") else "F32"


def _data(job: Export, layer: LayerSpec | None, weight: Tensor, kind: str) -> np.ndarray[Any, Any]:
    import torch

    if kind == "BF16":
        return weight.view(torch.uint8).numpy()
    if kind in _PLAIN:
        return weight.to(torch.float32 if kind == "F32" else torch.float16).numpy()
    assert layer is not None
    return pack(rows(job, layer, weight), kind).numpy()


def pack(made: Rows, kind: str) -> Tensor:
    """uint8 [blocks, bytes of a block] of a legacy type."""
    import torch

    scale, zero = made.scale.reshape(-1, 1), made.zero.reshape(-1, 1)
    parts = [scale.half().view(torch.uint8)]
    level = made.level.reshape(-1, BLOCK)
    if kind == "Q8_0":
        return torch.cat([*parts, level.to(torch.int8).view(torch.uint8)], 1)
    if kind.endswith("_1"):
        parts.append((-scale * zero).half().view(torch.uint8))
    else:
        level = level + 2 ** (int(kind[1]) - 1)  # stored from 0
    code = level.to(torch.int64)
    if kind.startswith("Q5"):
        high = ((code >> 4) << torch.arange(BLOCK)).sum(1, keepdim=True)
        parts.append(((high >> torch.tensor([0, 8, 16, 24])) & 255).to(torch.uint8))
    low = code & 15
    parts.append((low[:, : BLOCK // 2] | (low[:, BLOCK // 2 :] << 4)).to(torch.uint8))
    return torch.cat(parts, 1)
