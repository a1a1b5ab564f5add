"""A component's tensors written shard by shard, so that a model need not fit in memory twice."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import writing
from ..core.errors import QSearchError
from ..measure.shards import STEM, Weights

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 2**26  # bytes


def component(source: Path) -> str:
    """The folder of a pipeline's denoiser within it. Raises `QSearchError` where there is none."""
    for name in ("transformer", "unet", "prior", "decoder"):
        if (Path(source) / name / "config.json").is_file():
            return name
    raise QSearchError(
        f"{source} must be a folder of a diffusers pipeline, with a transformer or a unet in it"
    )


def replaced(
    weights: Weights, change: Mapping[str, Callable[[Tensor], dict[str, Tensor]]]
) -> Iterator[dict[str, Tensor]]:
    """A component's tensors one after the other: those named in `change` as it makes them, the
    others as they are.
    """
    for name in weights.files:
        held = weights.tensor(name)
        yield change[name](held) if name in change else {name: held}


#: tensor -> (shape, safetensors' names of the types that it may have)
Wanted = Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


def check_tensors(weights: Weights, wanted: Wanted) -> None:
    """Refuse a file whose tensors are not those of their format.

    Args:
        weights: what was written.
        wanted: what it must hold.

    Raises:
        QSearchError: names the first tensor that is missing, or has another type or shape.
    """
    for name, (shape, types) in wanted.items():
        rule = f"{' or '.join(types)} of {' x '.join(map(str, shape)) or 'one number'}"
        if name not in weights.files:
            raise QSearchError(f"{weights.folder} lacks {name}, {rule}; export again")
        found, kind = tuple(weights.shape(name)), weights.dtype(name)
        if found != shape or kind not in types:
            given = f"{kind} of {' x '.join(map(str, found)) or 'one number'}"
            raise QSearchError(f"{weights.folder}: {name} is {given}, not {rule}; export again")


#: torch's name of a type -> that of safetensors
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_CHUNK = 2**24  # bytes


class Parts:
    """Tensors on their way into one safetensors file, which may be larger than the memory: their
    bytes go to a file beside it as they are made.

    Args:
        path: the file beside, which `finish` removes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("w+b")
        #: name -> (type, shape, first byte, bytes)
        self.held: dict[str, tuple[str, list[int], int, int]] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write some tensors."""
        import torch

        for name, tensor in tensors.items():
            flat = tensor.detach().cpu().contiguous()
            at = self._file.tell()
            self._file.write(flat.reshape(-1).view(torch.uint8).numpy().data)
            kind = str(flat.dtype).removeprefix("torch.")
            self.held[name] = kind, list(flat.shape), at, flat.nbytes

    def bytes_of(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces."""
        _, _, at, left = self.held[name]
        self._file.seek(at)
        while left:
            piece = self._file.read(min(left, _CHUNK))
            left -= len(piece)
            yield piece

    def finish(self, path: Path, metadata: Mapping[str, str]) -> None:
        """The safetensors file: the header, and behind it the tensors, the widest types first, so
        that all are aligned.
        """
        order = sorted(self.held, key=lambda n: (-_width(self.held[n]), n))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        place = 0
        for name in order:
            kind, shape, _, size = self.held[name]
            header[name] = {
                "dtype": _TYPES[kind],
                "shape": shape,
                "data_offsets": [place, place + size],
            }
            place += size
        said = json.dumps(header, separators=(",", ":")).encode()
        said += b" " * (-len(said) % 8)
        with path.open("wb") as file:
            file.write(len(said).to_bytes(8, "little") + said)
            for name in order:
                for piece in self.bytes_of(name):
                    file.write(piece)
        self.close()

    def close(self) -> None:
        """Remove the file beside."""
        with suppress(OSError):  # on a full disk, what is left to write is not wanted any more
            self._file.close()
        self.path.unlink(missing_ok=True)


def _width(entry: tuple[str, list[int], int, int]) -> int:
    count = math.prod(entry[1])
    return entry[3] // count if count else 0


def write_shards(
    folder: Path,
    tensors: Iterable[Mapping[str, Tensor]],
    limit: int,
    metadata: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
    stem: str = STEM,
) -> list[Path]:
    """Write groups of tensors (those of one layer stay together) as safetensors, a new shard where
    `limit` bytes would be passed; an index for several.

    `metadata`: what a shard's header says beside its format, from the names in it. Only one shard
    is ever in memory. `stem`: how the files' names begin, as the library that loads them expects
    (`Weights.stem`).
    """
    from safetensors.torch import save_file

    held: dict[str, Tensor] = {}
    parts: list[tuple[Path, list[str], int]] = []

    def flush() -> None:
        path = folder / f"{len(parts)}.part"
        with writing(path):
            save_file(held, path, {"format": "pt", **(metadata(list(held)) if metadata else {})})
        parts.append((path, list(held), _bytes(held)))
        held.clear()

    for group in tensors:
        if held and _bytes(held) + _bytes(group) > limit:
            flush()
        held |= {name: tensor.contiguous() for name, tensor in group.items()}
    if held or not parts:
        flush()
    if len(parts) == 1:
        return [parts[0][0].rename(folder / f"{stem}.safetensors")]
    made: list[Path] = []
    placed: dict[str, str] = {}
    for i, (path, names, _) in enumerate(parts, 1):
        made.append(path.rename(folder / f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"))
        placed |= dict.fromkeys(names, made[-1].name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"metadata": {"total_size": sum(size for *_, size in parts)}, "weight_map": placed},
            indent=2,
        ),
        encoding="utf-8",
    )
    return [*made, index]


def _bytes(group: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in group.values())


def limit_of(weights: Weights) -> int:
    """What a shard may take: a third of the largest file of a component. Writing one takes its room
    twice, and the rest is for the layer at work.

    Small models stay in one file, which some tools' own loaders want.
    """
    return max(_SMALL, max(path.stat().st_size for path in set(weights.files.values())) // 3)


def copy_config(weights: Weights, folder: Path, **more: Any) -> Path:
    """config.json with some keys more."""
    path = folder / "config.json"
    if more:
        path.write_text(
            json.dumps({**weights.config, **more}, indent=2, sort_keys=True) + "\n",
            encoding="utf-8",
        )
        return path
    return Path(shutil.copyfile(weights.folder / "config.json", path))
