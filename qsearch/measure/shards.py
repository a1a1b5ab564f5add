"""Shards: a component's tensors on disk, read one at a time.

A safetensors file is opened for one tensor and closed again: what was read through its memory map
is given back. Files of torch.save (.bin), as older models have them, are read in the same way where
a folder has no others. Names come from the file or its index, and shards must lie beside the index:
an index that points elsewhere is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from ..core.errors import ArtifactError, QSearchError, first_line, nearest
from ..core.graph import LayerSpec, OpGraph

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
#: torch's name of a type -> that of safetensors, where it is not made of its first letter and bits
_TYPES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL"}


class Weights:
    """The tensors of a component's folder: `files` says in which file each lies, in the order of
    the files.

    `same`: names of tensors that are one, of which a file may hold one name alone; both are there
    to read. `variant`: of the files (fp16), where there are plain ones too, or several.
    """

    def __init__(
        self, folder: Path, same: Mapping[str, str] | None = None, variant: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self._stored: dict[str, str] = {}  # name -> the name under which its file has it
        safe = any(self.folder.glob("*.safetensors"))
        self._ending = "bin" if not safe and any(self.folder.glob("*.bin")) else "safetensors"
        own = self._variant(variant) if variant else None
        index, single = own or self._plain() or self._variant() or (None, None)
        if index is not None:
            self.files = self._indexed(index)
        elif single is not None:
            self.files = dict.fromkeys(_names(single), single)
        else:
            count = len(list(self.folder.glob(f"*.{self._ending}")))
            raise ArtifactError(
                f"{folder} must hold one safetensors (or .bin) file, or shards with an index; it "
                f"holds {count} files without one"
            )

        for name, other in (same or {}).items():
            for missing, held in ((name, other), (other, name)):
                if missing not in self.files and held in self.files:
                    self.files[missing], self._stored[missing] = self.files[held], held

    def _plain(self) -> tuple[Path | None, Path | None] | None:
        """(index, file) without a variant in the name: one of them."""
        end = self._ending
        indices = sorted(self.folder.glob(f"*.{end}.index.json"), key=lambda p: len(p.name))
        if indices:
            return indices[0], None
        path = self.folder / f"{STEM}.{end}"
        return (None, path) if path.is_file() else None

    def _variant(self, name: str = "*") -> tuple[Path | None, Path | None] | None:
        """(index, file) of a variant, or of the only one that there is, as `measure.loading` takes
        it too.
        """
        end = self._ending
        indices = sorted(self.folder.glob(f"*.{end}.index.{name}.json"))
        held = self.folder.glob(f"*.{end}" if name == "*" else f"*.{name}.{end}")
        files = [path for path in held if not _SHARD.search(path.name)]
        found = [(path, None) for path in indices] + [(None, path) for path in sorted(files)]
        return found[0] if len(found) == 1 else None

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(placed.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{index} is not an index of shards ({type(error).__name__}: {error}); "
                "copy the model again"
            ) from error
        for shard in shards:
            if Path(shard).name != shard or not (self.folder / shard).is_file():
                raise ArtifactError(
                    f"{index}: shards lie beside their index; there is no {shard!r}"
                )
        return {
            name: self.folder / shard for shard in shards for name in _names(self.folder / shard)
        }

    @property
    def stem(self) -> str:
        """How the names of its files begin: `model` for models of transformers, else diffusers'
        stem.
        """
        starts = ("model", "pytorch_model")
        plain = all(path.name.startswith(starts) for path in self.files.values())
        return "model" if plain else STEM

    @property
    def config(self) -> dict[str, Any]:
        """The component's config.json."""
        try:
            content = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder} has no readable config.json ({error}); give a folder of a "
                "diffusers pipeline"
            ) from error
        if not isinstance(content, dict):
            raise ArtifactError(
                f"{self.folder / 'config.json'} must hold an object, it holds "
                f"{type(content).__name__}"
            )
        return content

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises `QSearchError` with the nearest name."""
        if name not in self.files:
            raise QSearchError(f"{self.folder} holds no tensor {name!r}{nearest(name, self.files)}")
        with _opened(self.files[name]) as file:
            return file.get_tensor(self._stored.get(name, name)).clone()  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, read from the header alone."""
        with _opened(self.files[name]) as file:
            return tuple(file.get_slice(self._stored.get(name, name)).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as safetensors spells it, e.g. BF16, read from the header alone."""
        with _opened(self.files[name]) as file:
            return str(file.get_slice(self._stored.get(name, name)).get_dtype())

    def check(self, graph: OpGraph) -> None:
        """Refuse a graph whose layers these tensors are not: every weight must be there by name, in
        its shape.
        """
        for layer in graph:
            name = key(layer)
            if name not in self.files:
                raise QSearchError(
                    f"{graph.model} has a layer {layer.name}, and {self.folder} holds no "
                    f"{name}{nearest(name, self.files)}"
                )
            if self.shape(name) != layer.weight_shape:
                raise QSearchError(
                    f"{layer.name} is {layer.weight_shape} in the graph of {graph.model}, "
                    f"and {self.shape(name)} in {self.folder}"
                )


def key(layer: LayerSpec) -> str:
    """The name of a layer's weight in a state dict."""
    return f"{layer.name}.{layer.parameter}"


class _Saved:
    """What `safe_open` gives of a safetensors file, of one that torch.save wrote."""

    def __init__(self, path: Path) -> None:
        import torch

        # files of before 2020 can't be mapped, and are read whole
        mapped = zipfile.is_zipfile(path)
        held: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        held = held.get("state_dict", held)
        self._held: dict[str, Tensor] = {n: t for n, t in held.items() if torch.is_tensor(t)}

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._held)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, whose bytes stay in the file."""
        return self._held[name]

    def get_slice(self, name: str) -> _Form:
        """A tensor's shape and type."""
        return _Form(self._held[name])


class _Form:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Its type as safetensors spells it."""
        kind = str(self._tensor.dtype).removeprefix("torch.")
        return _TYPES.get(kind, f"{kind[0].upper()}{kind.lstrip(ascii_lowercase)}")


@lru_cache(maxsize=1)  # its table of contents is read in milliseconds, which add up over tensors
def _saved(path: Path, stamp: tuple[int, int]) -> _Saved:
    return _Saved(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    if path.suffix == ".bin":
        found = path.stat()
        yield _saved(path, (found.st_size, found.st_mtime_ns))
        return
    with safe_open(path, framework="pt") as file:
        yield file


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError

    try:
        with _opened(path) as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} is not readable as safetensors ({error}); copy the model again"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not readable as weights of torch.save ({first_line(error)[:200]}); copy "
            "the model again"
        ) from error
