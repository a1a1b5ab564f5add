"""One call of a pipeline's own denoiser, for tools that export by watching one: the model at full
precision and the arguments of that call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .exporting import Export


def traced(job: Export) -> tuple[nn.Module, dict[str, Any]]:
    """The job's denoiser, and keyword arguments of one guided call for one prompt; fixed shapes are
    those of this call.
    """
    from ..measure.pipelines import (
        Sampling,
        denoisers_of,
        example_inputs,
        load_pipeline,
        record,
        scene_prompts,
    )

    pipe = load_pipeline(job.source, variant=job.variant)
    parts = denoisers_of(pipe)
    model = parts[job.component].eval()
    sampling = Sampling(steps=2 if len(parts) == 1 else Sampling.steps)
    calls = record(pipe, scene_prompts(1, seed=0), sampling, bins=1)
    call = next(call for call in calls if call.component in ("", job.component))
    inputs = {
        name: value for name, value in example_inputs(call, model).items() if value is not None
    }
    return model, inputs | (
        {"return_dict": False}
        if "return_dict" in inspect.signature(model.forward).parameters
        else {}
    )


class Positional(nn.Module):
    """`model` with its tensor arguments in order, those in dictionaries too (`names`, with a dot
    for each level); what is no tensor is part of it.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tensors = dict(leaves(inputs))
        self.names = tuple(self.tensors)
        self.fixed = {
            name: value for name, value in inputs.items() if not isinstance(value, Tensor | dict)
        }

    def forward(self, *tensors: Tensor) -> Tensor:
        """The denoiser's output, the first of what the model returns."""
        given: dict[str, Any] = dict(self.fixed)
        for name, tensor in zip(self.names, tensors, strict=True):
            *path, last = name.split(".")
            at = given
            for part in path:
                at = at.setdefault(part, {})
            at[last] = tensor
        made = self.model(**given)
        found: Tensor = made if isinstance(made, torch.Tensor) else made[0]
        return found


def leaves(inputs: Mapping[str, Any], path: str = "") -> list[tuple[str, Tensor]]:
    """Tensors among a call's arguments by name, those in dictionaries with a dot for each level."""
    found = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found.append((path + name, value))
        elif isinstance(value, dict):
            found += leaves(value, f"{path}{name}.")
    return found
