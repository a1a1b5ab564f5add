"""Captions and sampler settings of any model of the zoo, pictures and clips alike."""

from __future__ import annotations

from qsearch import zoo
from qsearch.measure.pipelines import Prompts, Sampling, scene_prompts


def prompts_of(name: str, count: int, seed: int) -> Prompts:
    """Held-out captions of scenes, moving ones for a model of clips."""
    return scene_prompts(count, seed=seed, moving=name in zoo.VIDEO_NAMES)


def sampling_of(name: str, steps: int, seed: int, batch: int = 16) -> Sampling:
    """The sampler with the zoo's guidance, and with the zoo's frames for a model of clips."""
    if name not in zoo.VIDEO_NAMES:
        return Sampling(steps=steps, seed=seed, batch=batch)
    frames, height, width = zoo.CLIP
    return Sampling(steps, seed=seed, batch=batch, frames=frames, height=height, width=width)
