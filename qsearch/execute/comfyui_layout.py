"""The tensors of ComfyUI's formats for one layer, by the names that stand behind the layer's own.

Block scales lie in the tiles that tensor cores read (cuBLAS, "1D block scaling factors layout": 128
x 4, of 32 x 16). 4-bit codes have the first of two columns in the low bits, but for nvfp4. Levels
of `asym_w4a8_int8` are over 256 and its block scales 256 times ours: the products are the same
numbers, and its scales are e4m3 numbers as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.graph import LayerSpec
from ..core.scheme import Scheme
from ..measure.shards import Weights
from .codes import coded, rows
from .exporting import Export
from .turned import turned
from .weights import check_tensors

if TYPE_CHECKING:
    from torch import Tensor

_TILE = (128, 4)
_E4M3, _FLOATS = ("F8_E4M3",), ("F16", "BF16", "F32")


def packed(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    """What stands for a layer's weight in its plan's scheme.

    Args:
        job: the export.
        layer: a linear layer that the plan does not keep.
        weight: its weight [rows, columns].

    Returns:
        `weight`, its scales, and what else the format has, as "weight_scale".
    """
    import torch

    scheme = job.plan.layers[layer.name]
    if scheme.transforms:
        behind = turned(job, layer, weight)
        job, weight = behind.job, behind.weight
    if scheme.format == "cb4":
        return _levels(job, layer, weight)
    made = rows(job, layer, weight)
    level = made.level.reshape(weight.shape)
    if scheme.family == "int":
        if scheme.format == "int4":
            return {
                "weight": _halves(level.to(torch.int8)),
                "weight_scale": made.scale[:, 0].float(),
            }
        scale = made.scale.reshape(()) if scheme.group == -1 else made.scale
        return {"weight": level.to(torch.int8), "weight_scale": scale.float()}
    if scheme.family == "uint":
        kind = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
        return {
            "weight": _halves(level.to(torch.int8)),
            "weight_scale": made.scale.mT.to(kind).contiguous(),
            "weight_zeros": ((8 - made.zero) * made.scale).mT.to(kind).contiguous(),
        }
    if scheme.family == "float":
        return {
            "weight": level.to(torch.float8_e4m3fn),
            "weight_scale": made.scale.reshape(()).float(),
        }
    code = coded(job, layer, weight)
    scale = code.scale[..., 0]
    if scheme.format == "mxfp8":
        return {
            "weight": level.to(torch.float8_e4m3fn),
            "weight_scale": tiled((scale.log2() + 127).to(torch.uint8)),
        }
    nibble = code.codes.reshape(weight.shape)
    return {
        "weight": (nibble[:, ::2] << 4) | nibble[:, 1::2],
        "weight_scale": tiled(scale.to(torch.float8_e4m3fn)),
        "weight_scale_2": torch.tensor(code.unit),
    }


def _levels(job: Export, layer: LayerSpec, weight: Tensor) -> dict[str, Tensor]:
    import torch

    from ..choices.int8_codebook import UNIT, LevelCodes
    from ..choices.quantization import quantize

    code = quantize(weight, job.plan.layers[layer.name], layer=layer.name).code
    assert isinstance(code, LevelCodes)
    return {
        "weight": _halves(code.codes.flatten(1)).view(torch.int8),
        "weight_s_rel": (code.block[..., 0] * UNIT).to(torch.float8_e4m3fn),
        "weight_s_channel": code.row.flatten(),
        "weight_codebook": code.levels / UNIT,
    }


def _halves(level: Tensor) -> Tensor:
    """Bytes [rows, columns] of 4 bits each -> [rows, columns / 2], the first of two in the low
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


def check_shapes(weights: Weights, layer: LayerSpec, scheme: Scheme, form: str) -> None:
    """Refuse tensors that have not the types and shapes of their layout.

    Args:
        weights: the file's.
        layer: the layer.
        scheme: what its marker says, without a rotation.
        form: ComfyUI's name of its format.

    Raises:
        QSearchError: a tensor is missing, or has another type or shape.
    """
    out, width = layer.weight_shape
    blocks = width // scheme.group if scheme.group > 0 else 0
    tall, wide = (-(-n // size) * size for n, size in zip((out, blocks), _TILE, strict=True))
    halved = (out, width // 2)
    channel = () if scheme.group == -1 else (out, 1)
    side = ((blocks, out), _FLOATS)
    parts: dict[str, dict[str, tuple[tuple[int, ...], tuple[str, ...]]]] = {
        "float8_e4m3fn": {"weight": ((out, width), _E4M3), "weight_scale": ((), ("F32",))},
        "int8_tensorwise": {"weight": ((out, width), ("I8",)), "weight_scale": (channel, ("F32",))},
        "convrot_w4a4": {"weight": (halved, ("I8",)), "weight_scale": ((out,), ("F32",))},
        "awq_w4a16": {"weight": (halved, ("I8",)), "weight_scale": side, "weight_zeros": side},
        "mxfp8": {"weight": ((out, width), _E4M3), "weight_scale": ((tall, wide), ("U8",))},
        "nvfp4": {
            "weight": (halved, ("U8",)),
            "weight_scale": ((tall, wide), _E4M3),
            "weight_scale_2": ((), ("F32",)),
        },
        "asym_w4a8_int8": {
            "weight": (halved, ("I8",)),
            "weight_s_rel": ((out, blocks), _E4M3),
            "weight_s_channel": ((out,), ("F32",)),
            "weight_codebook": ((16,), ("F32",)),
        },
    }
    check_tensors(weights, {f"{layer.name}.{part}": held for part, held in parts[form].items()})
