"""One call of a pipeline's own denoiser, for tools that export by watching one: the model at full precision and the arguments of that call."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .exporting import Export

if TYPE_CHECKING:
    from torch import nn


def traced(job: Export) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of `job.source`, and keyword arguments of one guided call for one prompt; the exported shapes are those of this call."""
    from ..measure.pipelines import Sampling, denoiser_of, example_inputs, load_pipeline, record, scene_prompts

    pipe = load_pipeline(job.source)
    model = denoiser_of(pipe).eval()
    call = record(pipe, scene_prompts(1, seed=0), Sampling(steps=2), bins=1)[0]
    inputs = {name: value for name, value in example_inputs(call, model).items() if value is not None}
    return model, inputs | ({"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {})
