"""Placement: a model that came with a device_map, or with accelerate's hooks, stays where they put
it.

accelerate's hooks send what a module is given to where it computes, and bring in weights that are
offloaded for the length of a call. So such a model is called as it is. What changes weights or
takes gradients of them needs weights that stay: those under an offload hook are on the meta device
between calls, each call has others, and what is done to them would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..core.errors import QSearchError
from ..graphs.components import parts_of
from .components import components


def is_placed(module: nn.Module) -> bool:
    """Whether a model has a place of its own: a device_map, or hooks that move it."""
    return bool(_map(module)) or any(True for _ in _hooks(module))


def places_of(module: nn.Module) -> tuple[str, ...]:
    """Where a model's weights are by its device_map or its hooks, in their order.

    Args:
        module: a model that `is_placed`.

    Returns:
        Devices, and "disk"; "offloaded" for weights that a hook keeps in memory between calls.
    """
    found = [str(place) for place in _map(module).values()]
    if not found:
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            found += [] if device is None else [str(device)]
            found += ["offloaded"] if getattr(hook, "offload", False) else []
    named = [f"cuda:{place}" if place.isdigit() else place for place in found]
    return tuple(dict.fromkeys(named))


def placement(owner: Any) -> str:
    """One line on the models of a pipeline (or a model) that keep their own places; "" where there
    are none.
    """
    parts = parts_of(owner) if isinstance(owner, nn.Module) else components(owner)
    told = []
    for name, part in parts.items():
        if isinstance(part, nn.Module) and is_placed(part):
            how = "device_map" if _map(part) else "offload hooks"
            told.append(
                f"{name or type(part).__name__} is placed by its own {how} on "
                f"{', '.join(places_of(part))}"
            )
    return f"{'; '.join(told)}: left there" if told else ""


def device_of(module: nn.Module) -> torch.device:
    """Where a model computes: by its hooks, else where its first weight is."""
    for hook in _hooks(module):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    return next(module.parameters()).device


def check_placement(pipe: Any, model: nn.Module, say: Callable[[str], None]) -> None:
    """Refuse what `check_weights_stay` refuses, and say which models keep their own places.

    Args:
        pipe: a diffusers pipeline.
        model: its denoiser, or the container of several components.
        say: takes the line.

    Raises:
        QSearchError: as `check_weights_stay`.
    """
    check_weights_stay(model)
    if line := placement(pipe):
        say(line)


def check_weights_stay(model: nn.Module) -> None:
    """Refuse a model of which some weights are there during a call alone, before any work.

    Args:
        model: the denoiser, or the container of several components.

    Raises:
        QSearchError: names the first such weight and the alternative.
    """
    if not any(map(is_placed, parts_of(model).values())):
        return
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise offloaded(name.rpartition(".")[0])


def offloaded(layer: str) -> QSearchError:
    """What is said of a layer whose weight an offload hook brings in for each call."""
    return QSearchError(
        f"the weight of {layer} is on the meta device between calls, where an offload hook keeps "
        "it, so no gradient can be taken of it and no plan applied: load the pipeline with "
        "`offload: disk` in place of its device_map (`load_pipeline(folder, offload='disk')`), or "
        "call `accelerate.hooks.remove_hook_from_submodules(model)` first"
    )


def _map(module: nn.Module) -> dict[str, Any]:
    found = getattr(module, "hf_device_map", None)
    return found if isinstance(found, dict) else {}


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of a model and its modules, one by one."""
    for part in module.modules():
        if (hook := part.__dict__.get("_hf_hook")) is not None:
            yield from getattr(hook, "hooks", (hook,))
