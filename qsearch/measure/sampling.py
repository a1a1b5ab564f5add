"""Sampling: how a pipeline makes pictures, for recording, calibrating and evaluating.

Plain data without torch: it is a section of the config and an argument of whatever samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler; the pipeline's own size where `resolution` is left out."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    steps: Annotated[int, Field(ge=1, description="sampler steps")] = 20
    guidance: Annotated[float, Field(ge=0, description="guidance scale")] = 4.0
    seed: Annotated[
        int, Field(ge=0, description="of the first sample's noise; a run adds its own seed")
    ] = 0
    batch: Annotated[int, Field(ge=1, description="pictures at once")] = 32
    resolution: Annotated[
        int | None, Field(ge=8, description="pixels of a side; the pipeline's own when left out")
    ] = None
    frames: Annotated[
        int | None, Field(ge=1, description="of a video; the pipeline's own when left out")
    ] = None
    call: Annotated[
        Mapping[str, Any],
        Field(
            description="more keywords of the pipeline's call; texts that name files are read "
            "(pictures, videos, tensors, sounds), a list of files or {each: [values]} has one a "
            "sample, in turn"
        ),
    ] = field(default_factory=dict, hash=False)
