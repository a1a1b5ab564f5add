"""Noise of one layer's weight by hand: rounded in plain torch, exchanged in the model, the pipeline
called plainly; beside the sweep's.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from qsearch.core.graph import LayerSpec
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Prompts, Sampling, example_inputs, model_of, record
from qsearch.measure.profiling import profile
from qsearch.measure.trajectory import trajectories
from qsearch.zoo.painters import MAX_WORDS
from tests.tiny_pipelines import build

TEXTS = ("a small red circle", "two large blue squares")
SEED = 3
_SIZE = {"height": 32, "width": 32}
_PLAIN = {"clean_caption": False, "use_resolution_binning": False}
_WORDS = {"max_sequence_length": MAX_WORDS}
_VIDEO = {"height": 16, "width": 16, "num_frames": 5}
#: pipeline -> arguments of its call besides prompts, guidance, steps and generators
PIPELINES: dict[str, dict[str, Any]] = {
    "stable_diffusion": {},
    "stable_diffusion_xl": {},
    "pixart_alpha": {**_SIZE, **_PLAIN},
    "pixart_sigma": {**_SIZE, **_PLAIN, **_WORDS},
    "hunyuan_dit": {**_SIZE, "use_resolution_binning": False},
    "stable_diffusion_3": {**_SIZE, **_WORDS},
    "flux": {**_SIZE, **_WORDS},
    "sana": {**_SIZE, **_PLAIN, **_WORDS},
    "cogvideox": {**_VIDEO, **_WORDS},
    "wan_22": {**_VIDEO, **_WORDS},
    "z_image": {**_SIZE, **_WORDS},
    "auraflow": {**_SIZE, **_WORDS},
}


def rounded(weight: Tensor, layer: LayerSpec) -> Tensor:
    """Symmetric 4-bit integers, a scale for each output channel and each part of a concatenated
    input.
    """
    parts = []
    for part in weight.split(list(layer.parts) or weight.shape[1], 1):
        rows = part.flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / 7).half().float()  # as it is stored
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        parts.append(((rows / scale).round().clamp(-8, 7) * scale).view_as(part))
    return torch.cat(parts, 1)


@torch.no_grad()
def latents(pipe: Any, more: dict[str, Any]) -> Tensor:
    """What the pipeline's own call makes [N, ...]."""
    made = pipe(
        prompt=list(TEXTS),
        guidance_scale=3.0,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(SEED * 1_000_003 + i) for i in range(2)],
        output_type="latent",
        **more,
    )[0]
    return torch.stack(list(made)).double()


def compared(name: str, count: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Layer -> (noise by the sweep, noise by hand) of `count` random layers of a tiny pipeline at
    int4.
    """
    pipe, more = build(name), PIPELINES[name]
    sampling = Sampling(steps=2, guidance=3.0, seed=SEED, call=more)
    prompts, model = Prompts(TEXTS), model_of(pipe)
    graph = extract(model, example_inputs(record(pipe, prompts, sampling, 1)[0], model))
    layers = [layer for layer in graph.quantizable if not layer.channel_axis]
    chosen = random.Random(seed).sample(sorted(layers, key=lambda layer: layer.name), count)
    reference = latents(pipe, more)
    by_hand = {}
    for layer in chosen:
        module: Any = model.get_submodule(layer.name)
        kept = module.weight.data
        module.weight.data = rounded(kept, layer)
        error = (latents(pipe, more) - reference).square().sum()
        by_hand[layer.name] = float(error / reference.square().sum())
        module.weight.data = kept
    swept = profile(
        model,
        graph,
        ["int4-c"],
        trajectories(pipe, prompts, sampling, 2),
        estimator="sweep",
        metrics=("sqnr",),
        mode="trajectory",
        pipe=pipe,
        sampling=sampling,
    )
    ours = swept.frame[swept.frame["metric"] == "sqnr"].groupby("site")["estimate"].sum()
    return {layer: (float(ours[layer]), hand) for layer, hand in by_hand.items()}
