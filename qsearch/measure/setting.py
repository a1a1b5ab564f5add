"""EvaluationSetting: all that a measurement depends on besides the plan, and the key that says
so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import CalibrateOptions
from .pipelines import Call, Prompts, Sampling, record


@dataclass(frozen=True)
class Calibration:
    """What is recorded for schemes that choose by calls: prompts, sampler, bins and batch."""

    prompts: Prompts
    sampling: Sampling
    options: CalibrateOptions

    def record(self, pipe: Any, components: Sequence[str] = ()) -> list[Call]:
        """The calls of a graph's components (the denoisers when left out), of denoisers in the
        middle of each step bin.
        """
        bins = min(self.options.bins, self.sampling.steps)
        return record(pipe, self.prompts, self.sampling, bins, self.options.batch, components)


@dataclass(frozen=True)
class EvaluationSetting:
    """Prompts, sampler and metrics of a measurement, what schemes are calibrated on, and its `key`.

    Plans that are measured under one key can be compared. `calibration`: None where no scheme may
    ask for it. `real`: folder of real pictures that sets of pictures are compared with. `said`: the
    setting in words, kept beside each trial.
    """

    prompts: Prompts
    sampling: Sampling
    metrics: tuple[str, ...]
    key: str
    calibration: Calibration | None = None
    real: Path | None = None
    said: Mapping[str, str] = field(default_factory=dict, compare=False)
