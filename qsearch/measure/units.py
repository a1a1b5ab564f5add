"""Units: a model cut into the largest modules that take no more than a share of it, its parameters
without their weights, and the files that these come from.

A parameter that is not there holds NaN, seen in its own shape: a weight that is read at the wrong
moment shows in the output. Weights are read and not left mapped: pages of a map count as the
process's memory, and a file that is cut while it is mapped kills the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.errors import ArtifactError, QSearchError
from .shards import Weights

#: a unit takes no more than this share of its model's bytes, where its modules can be cut
SHARE = 1 / 24
#: modules that read the weights of their children without calling them
_WHOLE = (nn.MultiheadAttention,)


class AbstractSource(Protocol):
    """Where the weights of a component come from."""

    def read(self, name: str) -> Tensor:
        """One tensor in memory, by its name in a state dict."""
        ...


class Files(AbstractSource):
    """The files of a component's folder, read a tensor at a time.

    Args:
        folder: of the component.
        variant: of its files.

    Raises:
        QSearchError: there are no safetensors files, or shards are missing or cut.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        self.weights = Weights(folder, variant=variant)
        self._seen = {path: _stamp(path) for path in set(self.weights.files.values())}

    def read(self, name: str) -> Tensor:
        """One tensor. Raises `QSearchError` for a file that was changed since it was opened."""
        path = self.weights.files[name]
        if _stamp(path) != self._seen[path]:
            raise QSearchError(
                f"{path} was changed while its model was at work; what is measured "
                "belongs to the files as they were: "
                "start again with files that stay"
            )
        try:
            return self.weights.tensor(name)
        except QSearchError:
            raise
        except Exception as error:  # safetensors raises a class of its own
            raise ArtifactError(f"{path}: {name} can't be read ({error}); copy it again") from error


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


class Held(AbstractSource):
    """Weights that are read once and stay in RAM, for units that go to a GPU one at a time."""

    def __init__(self, source: AbstractSource) -> None:
        self.source, self._held = source, dict[str, Tensor]()

    def read(self, name: str) -> Tensor:
        """One tensor, the same one each time."""
        if name not in self._held:
            self._held[name] = self.source.read(name)
        return self._held[name]


@dataclass(eq=False)
class Place:
    """A parameter and the name under which its weights are stored."""

    parameter: nn.Parameter
    name: str
    loaded: bool = False


@dataclass(eq=False)
class Unit:
    """A module whose weights come and go together."""

    name: str
    module: nn.Module
    places: list[Place] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What its weights take while they are there."""
        return sum(p.parameter.numel() * p.parameter.element_size() for p in self.places)


def placed(
    model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype
) -> list[Place]:
    """Put a parameter that holds nothing in the place of each that is on the meta device, and read
    the model's buffers.
    """
    names = weights.files
    wide = set(_kept_wide(model, dtype))
    made: dict[int, Place] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in made and made[id(parameter)].name in names:
            continue
        kind = torch.float32 if wide.intersection(name.split(".")) else dtype
        kind = kind if parameter.is_floating_point() else parameter.dtype
        empty = torch.empty(parameter.shape, dtype=kind, device="meta")
        made[id(parameter)] = Place(nn.Parameter(nothing(empty, device), requires_grad=False), name)
    lacking = [place.name for place in made.values() if place.name not in names]
    if lacking:
        raise QSearchError(
            f"{weights.folder} lacks {lacking[0]}, a weight of {type(model).__name__}: "
            "copy the model again"
        )
    for module in model.modules():
        for own, held in module._parameters.items():
            if held is not None:
                module._parameters[own] = made[id(held)].parameter
    for module_name, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{module_name}.{own}" if module_name else own
            if name in names:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                buffer = weights.tensor(name).to(kind)
            module._buffers[own] = buffer.to(device)
    return list(made.values())


def _kept_wide(model: nn.Module, dtype: torch.dtype) -> Sequence[str]:
    """Names of modules whose weights stay in fp32, as the libraries keep them when they load."""
    if dtype == torch.float32:
        return ()
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    own = getattr(model, "_keep_in_fp32_modules", None) or ()
    own = [own] if isinstance(own, str) else own
    half = dtype == torch.float16 or type(model).__module__.startswith("diffusers.")
    return (*always, *own) if half else tuple(always)


def nothing(kind: Tensor, device: torch.device | None = None) -> Tensor:
    """NaN in the shape, type and place of a tensor, which takes no memory."""
    number = float("nan") if kind.is_floating_point() else 0
    return torch.full((), number, dtype=kind.dtype, device=device or kind.device).expand(kind.shape)


def largest_unit(model: nn.Module) -> tuple[int, int]:
    """(parameters of the largest unit that a model is cut into, those of the largest layer)."""
    whole = sum(p.numel() for p in model.parameters())
    width = max((p.element_size() for p in model.parameters()), default=4)
    units, _ = cut(model, whole * width * SHARE)
    block = max((sum(p.numel() for p in m.parameters()) for m in units.values()), default=0)
    return block, max((p.numel() for p in model.parameters()), default=0)


def cut(model: nn.Module, largest: float) -> tuple[dict[str, nn.Module], set[int]]:
    """(name -> unit, parameters that belong to none: those of modules that were cut)."""
    units: dict[str, nn.Module] = {}
    rest: set[int] = set()
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        called = type(module).forward is not nn.Module.forward
        small = size <= largest or isinstance(module, _WHOLE) or not list(module.children())
        if name and size and called and small:
            units[name] = module
            return
        rest.update(id(p) for p in module._parameters.values() if p is not None)
        for own, child in module.named_children():
            walk(f"{name}.{own}" if name else own, child)

    walk("", model)
    return units, rest
