"""Options of profiling, calibration and reconstruction: sections of the config, and arguments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..core.settings import Settings


class ProfileOptions(Settings):
    """What is measured of each layer, and how.

    `schemes`, `bins`, `samples`, `batch` and `mode` say what `profile_pipeline` records and prices;
    `profile`, which is given schemes and recorded calls, goes by the rest.
    """

    schemes: tuple[str, ...] = Field(
        ("uint2-c", "uint3-c", "uint4-c", "uint8-c"),
        min_length=1,
        description="choices for each layer",
    )
    estimator: str = Field("probe", description="plug-in of `qsearch list estimators`")
    bins: int = Field(3, ge=1, description="step bins; the call in the middle of each is recorded")
    samples: int = Field(8, ge=2, description="recorded samples a bin")
    batch: int = Field(
        2,
        ge=1,
        description="samples in one pass; each pass has probes of its own, four passes or more "
        "give the better error bars",
    )
    metrics: tuple[str, ...] = Field(
        ("noise",),
        min_length=1,
        description="noise (of the denoiser's output), or plug-ins of `qsearch list metrics`",
    )
    mode: Literal["step", "trajectory"] = Field(
        "step", description="each step bin on its own, or the whole sampler at once"
    )
    probes: int = Field(
        24, ge=2, description="random vectors a pass, for the estimators that use them"
    )
    seed: int = Field(0, ge=0, description="of the probes; a run adds its own seed")
    sites: tuple[str, ...] = Field(
        (),
        description="patterns of attention's sites, e.g. '*:softmax'; they get those schemes "
        "that are keep+aFORMAT",
    )
    attentions: tuple[str, ...] = Field(
        (),
        description="choices for whole self-attentions, e.g. window8~rettention; those that carry "
        "something from step to step are priced with mode trajectory",
    )
    attention_sites: tuple[str, ...] = Field(
        ("*",), description="patterns of the sites MODULE:attention that get those choices"
    )
    attention_ranges: int | None = Field(
        None,
        ge=1,
        description="equal ranges of steps at whose beginnings those choices are taken to begin "
        "anew, with a dense step; a run takes as many as its plan has (allocate.steps), `profile` "
        "one",
    )
    score: dict[str, str] = Field(
        {},
        description="pattern of layers -> metric that scores them, for the metric `scored`; "
        "the first that fits",
    )
    autocast: Literal["", "bfloat16", "float16"] = Field(
        "", description="type that the denoiser computes in where torch thinks it safe"
    )
    checkpointing: bool = Field(
        False, description="less memory, more time: backwards compute each block again"
    )
    budget_seconds: float | None = Field(
        None, ge=0, description="stop after this time with what there is"
    )


class CalibrateOptions(Settings):
    """Calls on which methods, transforms and static ranges choose, where a scheme asks for them.

    They are recorded on the first prompts, with noise of their own.
    """

    samples: int | None = Field(None, ge=2, description="prompts; those of profiling when left out")
    bins: int = Field(4, ge=1, description="step bins; the call in the middle of each is recorded")
    batch: int = Field(4, ge=1, description="samples in one call")


class ReconstructOptions(Settings):
    """Rounding and static input ranges of a plan, learnt block by block before it is measured.

    For schemes that say @adaround or @adaround_scaled.
    """

    order: Literal["none", "separate", "joint"] = Field(
        "none", description="weights first and input ranges after, or both at once"
    )
    steps: int = Field(200, ge=1, description="of Adam for each block, all phases together")
    rate: float = Field(3e-2, gt=0, description="learning rate of gates")
    input_rate: float = Field(
        5e-3, gt=0, description="learning rate of the factors on input ranges"
    )
