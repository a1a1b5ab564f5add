"""Offloading: where a model's weights stay while it is at work, chosen from the memory that is
free, before anything is loaded.

Sizes come from the headers of the files and from the model's classes without their weights; "about"
is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.components import is_denoiser
from ..core.errors import QSearchError, nearest
from .sizes import components_in, free_memory

#: what may be asked
CHOICES = ("auto", "none", "block", "disk")
#: bytes of one weight, by the type that a model is loaded in
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
#: type of safetensors files -> type that a model is loaded in; others are widened
_OWN = {"BF16": "bfloat16", "F8_E4M3": "bfloat16", "F8_E5M2": "bfloat16"}
#: Python and its libraries, and what quantizing the largest weight of a block takes in fp32
_BASE, _COPIES = 2**29, 6
#: share of the free memory that is taken
_SHARE = 0.9


@dataclass(frozen=True)
class Offload:
    """What was chosen.

    Attributes:
        kind: none, block or disk.
        bytes: memory that the weights, gradients and quantized weights take, about; activations
            come on top.
        why: in words.
    """

    kind: str
    bytes: float
    why: str


def own_type(folder: Path) -> str:
    """The type that a saved pipeline's denoiser is loaded in where none is given: that of its
    files, but float32 for fp16.

    Gradients of probes fall below what fp16 holds, and CPUs hardly multiply it.
    """
    held = components_in(folder)
    stored = next((one.dtype for name, one in held.items() if is_denoiser(name)), "F32")
    return _OWN.get(stored, "float32")


def offload_of(folder: Path, device: str, dtype: str, asked: str = "auto") -> Offload:
    """How a saved pipeline is to be loaded.

    Args:
        folder: of the pipeline.
        device: a torch device.
        dtype: type of its weights.
        asked: none, block or disk; auto takes the first of them that fits the free memory.

    Returns:
        The choice, with what it takes.

    Raises:
        QSearchError: an unknown word, or one block at a time takes more memory than is free.
    """
    if asked not in CHOICES:
        raise QSearchError(
            f"offload is one of {', '.join(CHOICES)}; given {asked!r}{nearest(asked, CHOICES)}"
        )
    held, width = components_in(folder), WIDTHS[dtype]
    denoisers = sum(one.parameters for name, one in held.items() if is_denoiser(name)) * width
    whole = sum(one.parameters for one in held.values()) * width
    ram, there = free_memory(), _free(device)
    gib = 2**30
    if asked == "none":
        return Offload("none", whole + denoisers, f"{whole / gib:.1f} GiB of weights in memory")
    if asked == "auto" and (there is None or whole + denoisers <= _SHARE * there):
        return Offload("none", whole + denoisers, f"{whole / gib:.1f} GiB of weights in memory")
    block, layer = blocks_in(folder, dtype)
    need = _BASE + 4 * block + _COPIES * 4 * layer
    words = f"one block of {block / gib:.2f} GiB at a time, about {need / gib:.1f} GiB in all"
    if there is not None and need > there:
        raise QSearchError(
            f"one block of {folder.name} at a time takes about {need / gib:.1f} GiB in "
            f"{dtype}, and "
            f"{there / gib:.1f} GiB of {device} are free; free memory, or take a narrower dtype"
        )
    on_gpu = device.partition(":")[0] != "cpu"
    if asked == "block" or (
        asked == "auto" and on_gpu and ram is not None and whole <= _SHARE * ram
    ):
        return Offload("block", need, f"weights stay in RAM ({whole / gib:.1f} GiB), {words}")
    why = f"{whole / gib:.1f} GiB of weights stay on disk, {words}"
    if asked == "auto" and there is not None:
        why += (
            f": all at once take about {(whole + denoisers) / gib:.1f}, {there / gib:.1f} are free"
        )
    return Offload("disk", need, why)


def blocks_in(folder: Path, dtype: str) -> tuple[int, int]:
    """(bytes of the largest block, weights of the largest layer) of a saved pipeline's denoisers as
    they are streamed.
    """
    from .skeletons import empty_component
    from .units import largest_unit

    names = [
        p.parent.name for p in Path(folder).glob("*/config.json") if is_denoiser(p.parent.name)
    ]
    found = [largest_unit(empty_component(folder, name)) for name in names]
    block, layer = (max((one[i] for one in found), default=0) for i in (0, 1))
    return block * WIDTHS[dtype], layer


def _free(device: str) -> int | None:
    """Bytes that are free where the model computes; None where it is unknown."""
    if device.partition(":")[0] != "cuda":
        return free_memory()
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else None
