"""Sampling: how a pipeline makes pictures, for recording, calibrating and evaluating.

Plain data without torch: it is a section of the config and an argument of whatever samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from ..core.errors import QSearchError
from ..core.settings import Settings


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
    height: Annotated[int | None, Field(ge=8, description="pixels; `resolution` when left out")] = (
        None
    )
    width: Annotated[int | None, Field(ge=8, description="pixels; `resolution` when left out")] = (
        None
    )

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(height, width) that is asked for; None where it is the pipeline's own."""
        return self.height or self.resolution, self.width or self.resolution


class SamplingSettings(Settings):
    """The sampler of a run: what is left out is the model's own (`measure.own`)."""

    steps: int | None = Field(None, ge=1, description="sampler steps")
    guidance: float | None = Field(None, ge=0, description="guidance scale")
    seed: int = Field(0, ge=0, description="of the first sample's noise; a run adds its own seed")
    batch: int | None = Field(
        None, ge=1, description="pictures at once; by their size when left out"
    )
    resolution: int | None = Field(None, ge=8, description="pixels of both sides")
    height: int | None = Field(None, ge=8, description="pixels")
    width: int | None = Field(None, ge=8, description="pixels")
    frames: int | None = Field(None, ge=1, description="of a video")
    call: dict[str, Any] = Field(
        {},
        description="more keywords of the pipeline's call; texts that name files are read "
        "(pictures, videos, tensors, sounds), a list of files or {each: [values]} has one a "
        "sample, in turn",
    )

    def of(self, steps: int, guidance: float, batch: int) -> Sampling:
        """The sampler, with the model's own values where the section is silent."""
        return Sampling(
            self.steps or steps,
            guidance if self.guidance is None else self.guidance,
            self.seed,
            self.batch or batch,
            self.resolution,
            self.frames,
            self.call,
            self.height,
            self.width,
        )

    def check(self) -> None:
        """Refuse sizes that contradict each other."""
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and self.resolution not in (None, side):
                raise QSearchError(
                    f"resolution is both sides; given {self.resolution} beside {name} {side}: "
                    "give height and width"
                )
