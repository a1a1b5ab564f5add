"""Sizes: how many parameters a saved pipeline's components hold and what a machine has, without
loading a tensor.

Safetensors files begin with a header that names every tensor with its type and shape; of other
files the bytes are counted.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.progress import Progress

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_SHARD = re.compile(r"-\d+-of-\d+")
#: weights in files without such a header take four bytes each
_ELSE = 4
#: tensors of the widest full-resolution activation that a decoder holds at once: a residual block's
#: input, its norm, its activation, its output, and room for the convolution. Measured on
#: Stable Diffusion's VAE on a CPU: 4.7 at 256 px, 4.0 at 384 px
_COPIES = 5
#: channels of a decoder's widest activation at full resolution, where its config does not say
_WIDTH = 256


@dataclass(frozen=True)
class Held:
    """What a component's files hold: `parameters` of them, in `bytes` on disk; `dtype` as most are
    stored, e.g. "F16".
    """

    parameters: int
    bytes: int
    dtype: str


def weight_files(component: Path) -> list[Path]:
    """The files of a component's weights, of one variant: safetensors before others, plain before
    named variants.
    """
    files = sorted(p for p in component.glob("*") if p.suffix in (".safetensors", ".bin"))
    safe = [p for p in files if p.suffix == ".safetensors"]
    by_kind: dict[str, list[Path]] = {}
    for path in safe or files:
        by_kind.setdefault(_SHARD.sub("", path.name), []).append(path)
    return by_kind[min(by_kind, key=lambda n: (n.count("."), n))] if by_kind else []


def held_in(component: Path) -> Held:
    """What the weight files in a component's folder hold."""
    count = size = 0
    types: dict[str, int] = {}
    for path in weight_files(component):
        size += path.stat().st_size
        for dtype, shape in _tensors(path).values():
            n = math.prod(shape)
            count += n
            types[dtype] = types.get(dtype, 0) + n
    return Held(count, size, max(types, key=lambda t: types[t]) if types else "")


def tensors_in(component: Path) -> list[tuple[str, list[int]]]:
    """(name, shape) of every tensor in a component's files."""
    files = weight_files(component)
    return [(name, held[1]) for path in files for name, held in _tensors(path).items()]


def bytes_in(component: Path) -> dict[str, tuple[int, int]]:
    """Tensor -> (its bytes, bytes of one element), of a component's files."""
    found = {}
    for path in weight_files(component):
        for name, (dtype, shape) in _tensors(path).items():
            width = _BYTES.get(dtype, _ELSE if not dtype else 1)
            found[name] = (math.prod(shape) * width, width)
    return found


def _tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (type, shape); of a file without a header one tensor of as many weights as its bytes
    allow.
    """
    if path.suffix != ".safetensors":
        return {path.name: ("", [path.stat().st_size // _ELSE])}
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(min(length, 10**8)))
    except (OSError, ValueError, MemoryError):
        return {}
    return {n: (v["dtype"], v["shape"]) for n, v in header.items() if n != "__metadata__"}


def components_in(folder: Path) -> dict[str, Held]:
    """Component -> what its files hold, of those of a saved pipeline that have weights."""
    found = {p.name: held_in(p) for p in sorted(folder.iterdir()) if p.is_dir()}
    return {name: held for name, held in found.items() if held.parameters}


def free_memory() -> int | None:
    """Bytes that a process can still take, by the kernel and by the group of processes it is in;
    None where it is unknown.
    """
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdigit():
            cached = _cached()
            found.append(int(limit) - used + cached)
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def free_on(device: Any) -> int | None:
    """Bytes that are free on a torch device: of a GPU what torch holds and does not use, too; None
    where it is unknown.
    """
    import torch

    where = torch.device(device)
    if where.type != "cuda":
        return free_memory()
    if not torch.cuda.is_available():
        return None
    cached = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    return int(torch.cuda.mem_get_info(where)[0]) + cached


def decoding_bytes(config: Mapping[str, Any], pixels: int, width: int) -> float:
    """Memory that a VAE's decoder takes for pictures, about.

    It is `pixels` times the widest activation at full resolution (of the two levels that end there)
    times the bytes of a number, five times over: what a residual block holds at once.

    Args:
        config: of the VAE.
        pixels: of all pictures or frames that are decoded at once.
        width: bytes of one number.

    Returns:
        Bytes.
    """
    levels = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    if isinstance(levels, list | tuple) and all(isinstance(n, int) for n in levels):
        channels = max(levels[:2])
    elif isinstance(config.get("base_dim"), int):
        channels = config["base_dim"] * max((config.get("dim_mult") or (1, 2))[:2])
    else:
        channels = _WIDTH
    patch = config.get("patch_size")
    own = patch if isinstance(patch, int) and patch > 0 else 1
    return float(_COPIES * width * channels * pixels / own**2)


@contextmanager
def growing(folder: Path, dtype: str, progress: Progress, name: str) -> Iterator[None]:
    """Inside, a bar shows how much of a pipeline's weights the process has taken in."""
    width = 4 if dtype == "float32" else 2
    whole = sum(held.parameters for held in components_in(folder).values()) * width
    start, ended = resident(), threading.Event()
    with progress.track(f"loading {name}", max(1, whole)) as advance:

        def look() -> None:
            seen = 0
            while not ended.wait(0.5):
                now = min(max(0, resident() - start), whole)
                if now > seen:
                    advance(now - seen)
                    seen = now

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def resident() -> int:
    """Bytes of memory that this process takes; 0 where it is unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def _cached() -> int:
    for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def total_memory() -> int | None:
    """Bytes of memory that the machine has; None where it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None
