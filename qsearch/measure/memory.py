"""What a backward takes: the bytes that a pass keeps for it, counted where autograd keeps them,
before the work starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from .pipelines import Call, forward
from .streaming import streams_of


@contextmanager
def requires_grad_only(model: nn.Module, chosen: set[nn.Parameter]) -> Iterator[None]:
    """Inside, of the model's parameters only the `chosen` want gradients."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in chosen and parameter.is_floating_point())
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])


def saved_activation_bytes(model: nn.Module, call: Call) -> int:
    """Bytes of activations that one call keeps for its backward, weights not counted. Takes one
    pass.

    With checkpointing, these are the inputs of its segments: what a segment keeps while it is
    computed again comes on top.
    """
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # an output that its own node kept would never be freed

    with (
        requires_grad_only(model, set(model.parameters())),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        output = forward(
            model, call
        )  # what is kept stays alive, and its address its own, as long as this does
    del output
    return sum(kept.values())


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, the model computes activations again in the backward, if `wanted`.

    Raises:
        QSearchError: the model has no checkpointing of diffusers'.
    """
    if not wanted or streams_of(model):  # whose units are computed again anyway
        yield
        return
    if not getattr(model, "_supports_gradient_checkpointing", False):
        name = type(model).__name__
        raise QSearchError(f"checkpointing is built into diffusers' models; {name} has none")
    switch: Any = model
    switch.enable_gradient_checkpointing()
    try:
        yield
    finally:
        switch.disable_gradient_checkpointing()
