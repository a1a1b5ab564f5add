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
from .sizes import components_in, free_memory, free_on

#: where weights may stay
KINDS = ("none", "block", "disk")
#: what may be asked
CHOICES = ("auto", *KINDS)
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


@dataclass(frozen=True)
class Sizes:
    """What a saved pipeline takes in the type that it is loaded in.

    Attributes:
        whole: bytes of all weights.
        denoisers: bytes of the denoisers' weights.
        block: bytes of the largest block that is streamed.
        layer: weights of the largest layer (a count).
        decoding: bytes that decoding one picture or video takes.
    """

    whole: float
    denoisers: float
    block: float
    layer: int
    decoding: float = 0.0


def streamed_bytes(block: float, layer: int) -> float:
    """Peak of a model of which one block at a time is in memory, about: two blocks, gradients and
    quantized weights of one, and the largest layer in fp32 while it is quantized.
    """
    return _BASE + 4 * block + _COPIES * 4 * layer


def peak_bytes(sizes: Sizes, verb: str, kind: str, device: str = "cpu") -> float:
    """Memory that a verb takes at its peak where the model computes, about, Python and its
    libraries among it; activations between blocks come on top.

    With offload none `profile` holds gradients beside the weights, and `evaluate` the quantized
    weights of a plan. On the CPU itself, block holds all weights in the same memory. `export`
    reads a layer at a time with every offload.

    Args:
        sizes: of the pipeline.
        verb: extract, profile, evaluate, apply or export.
        kind: none, block or disk.
        device: a torch device.

    Returns:
        Bytes.
    """
    layer = _BASE + _COPIES * 4 * sizes.layer
    if verb == "export":
        return layer
    streamed = layer if verb == "extract" else streamed_bytes(sizes.block, sizes.layer)
    both = sizes.denoisers if verb in ("profile", "evaluate") else 0.0
    work = _BASE + sizes.whole + both if kind == "none" else streamed
    if kind == "block" and device.partition(":")[0] == "cpu":
        work += sizes.whole
    if verb == "evaluate":  # a plan's weights are there while pictures are decoded, blocks are not
        held = work if kind == "none" else work - streamed + _BASE
        work = max(work, held + sizes.decoding)
    return work


def fitting(sizes: Sizes, verb: str, device: str, free: int | None, ram: int | None) -> str:
    """The first of none, block and disk with which a verb fits, block beside a GPU alone.

    Args:
        sizes: of the pipeline.
        verb: as for `peak_bytes`.
        device: a torch device.
        free: bytes free there; None where it is unknown.
        ram: bytes of RAM that are free.

    Returns:
        Its name; "" where none of them fits.
    """
    on_gpu = device.partition(":")[0] != "cpu"
    for kind in KINDS:
        if kind == "block" and not (on_gpu and (ram is None or sizes.whole <= _SHARE * ram)):
            continue
        share = 1.0 if kind == "disk" else _SHARE
        if free is None or peak_bytes(sizes, verb, kind, device) <= share * free:
            return kind
    return ""


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
    ram, there = free_memory(), free_on(device)
    gib = 2**30
    if asked == "none":
        return Offload("none", whole + denoisers, f"{whole / gib:.1f} GiB of weights in memory")
    if asked == "auto" and (there is None or whole + denoisers <= _SHARE * there):
        return Offload("none", whole + denoisers, f"{whole / gib:.1f} GiB of weights in memory")
    block, layer = blocks_in(folder, dtype)
    need = streamed_bytes(block, layer)
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
