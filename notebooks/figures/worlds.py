"""What a denoiser of the zoo is sampled with: its own size and frames, captions of its own
world.
"""

from __future__ import annotations

from qsearch import zoo
from qsearch.measure.own import own_of
from qsearch.measure.pipelines import Prompts, Sampling, scene_prompts
from qsearch.measure.sampling import SamplingSettings

MODELS = zoo.PIPELINES


def sampling_of(
    model: str, steps: int = 20, *, seed: int = 0, batch: int | None = None
) -> Sampling:
    """The model's own settings with so many sampler steps."""
    asked = SamplingSettings(steps=steps, seed=seed, batch=batch)
    return own_of(zoo.folder(model)).sampler(asked)


def prompts_of(model: str, count: int, seed: int) -> Prompts:
    """Captions that no training of the model saw."""
    return scene_prompts(count, seed, moving=model in zoo.VIDEO_NAMES)
