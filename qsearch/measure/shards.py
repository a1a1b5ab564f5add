"""Shards: a component's tensors on disk, read one at a time.

A safetensors file is opened for one tensor and closed again: what was read through its memory map
is given back. Names come from the file or its index, and shards must lie beside the index: an index
that points elsewhere is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ArtifactError, QSearchError, nearest
from ..core.graph import LayerSpec, OpGraph

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


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
        own = self._variant(variant) if variant else None
        index, single = own or self._plain() or self._variant() or (None, None)
        if index is not None:
            self.files = self._indexed(index)
        elif single is not None:
            self.files = dict.fromkeys(_names(single), single)
        else:
            count = len(list(self.folder.glob("*.safetensors")))
            raise ArtifactError(
                f"{folder} must hold one safetensors file, or shards with an index; it "
                f"holds {count} files without one"
            )

        for name, other in (same or {}).items():
            for missing, held in ((name, other), (other, name)):
                if missing not in self.files and held in self.files:
                    self.files[missing], self._stored[missing] = self.files[held], held

    def _plain(self) -> tuple[Path | None, Path | None] | None:
        """(index, file) without a variant in the name: one of them."""
        indices = sorted(self.folder.glob("*.safetensors.index.json"), key=lambda p: len(p.name))
        if indices:
            return indices[0], None
        path = self.folder / f"{STEM}.safetensors"
        return (None, path) if path.is_file() else None

    def _variant(self, name: str = "*") -> tuple[Path | None, Path | None] | None:
        """(index, file) of a variant, or of the only one that there is, as `measure.loading` takes
        it too.
        """
        indices = sorted(self.folder.glob(f"*.safetensors.index.{name}.json"))
        held = self.folder.glob("*.safetensors" if name == "*" else f"*.{name}.safetensors")
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
        plain = all(path.name.startswith("model") for path in self.files.values())
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
        from safetensors import safe_open

        if name not in self.files:
            raise QSearchError(f"{self.folder} holds no tensor {name!r}{nearest(name, self.files)}")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(self._stored.get(name, name)).clone()  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, read from the header alone."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(self._stored.get(name, name)).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as safetensors spells it, e.g. BF16, read from the header alone."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
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


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} is not readable as safetensors ({error}); copy the model again"
        ) from error
