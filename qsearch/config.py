"""A run's configuration: YAML -> frozen models; an unknown key is an error with the nearest name.

One section a verb; its keys are that verb's settings. Everything has a default but the model, so the shortest config is one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .core import plugins
from .core.artifacts import write_text
from .core.errors import QSearchError, nearest
from .core.plan import Budget
from .core.scheme import Scheme, input_part
from .decide.constraints import Constraints
from .decide.objectives import Objective


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingSection(_Section):
    """How the pipeline makes pictures, for recording and for evaluating."""

    steps: int = Field(20, ge=1, description="sampler steps")
    guidance: float = Field(4.0, ge=0, description="guidance scale")
    batch: int = Field(32, ge=1, description="pictures at once")
    resolution: int | None = Field(
        None, ge=8, description="pixels of a side; the pipeline's own when left out"
    )
    frames: int | None = Field(None, ge=1, description="of a video")


class ProfileSection(_Section):
    """What is measured of each layer."""

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
        description="samples in one pass; each pass has probes of its own, four passes or more give the better error bars",
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
    sites: tuple[str, ...] = Field(
        (),
        description="patterns of attention's sites, e.g. '*:softmax'; they get those schemes that are keep+aFORMAT",
    )
    score: dict[str, str] = Field(
        {},
        description="pattern of layers -> metric that scores them, for the metric `scored`; the first that fits",
    )
    autocast: Literal["", "bfloat16", "float16"] = Field(
        "", description="type that the denoiser computes in where torch thinks it safe"
    )
    checkpointing: bool = Field(
        False, description="less memory, more time: backwards compute each block again"
    )
    budget_seconds: float | None = Field(
        None, gt=0, description="stop after this time with what there is"
    )


class AllocateSection(_Section):
    """The budget, what is minimised and what must hold, and who finds the plan. Layers are named by patterns over name, role or block."""

    average_bits: float | None = Field(4.0, description="stored bits a weight, scales included")
    bytes: int | None = Field(None, description="stored bytes of all weights")
    bit_operations: float | None = Field(
        None, description="MACs x weight bits x activation bits of one call"
    )
    activation_bytes: int | None = Field(
        None, description="bytes of all layers' inputs in one call, at their activation bits"
    )
    latency: float | None = Field(None, description="seconds of one call on `device`")
    device: str | None = Field(
        None,
        description="for latency: one of `qsearch list devices` (a roofline), or a latency.json that was measured",
    )
    groups: dict[str, dict[str, float]] = Field(
        {}, description="pattern -> limit -> value, for those layers alone"
    )
    solver: str = Field("ilp", description="plug-in of `qsearch list solvers`")
    metric: str = Field("noise", description="column of the sensitivity table that is minimised")
    weights: dict[str, float] = Field(
        {}, description="metric -> weight, to minimise several at once instead of `metric`"
    )
    at_most: dict[str, float] = Field({}, description="metric -> largest total loss allowed")
    decibels: bool = Field(
        False, description="minimise the sum of decibels, as MixDQ does, to compare with"
    )
    tied: tuple[tuple[str, ...], ...] = Field(
        (), description="groups of layers that get one scheme"
    )
    fused: bool = Field(False, description="tie queries, keys and values that read one input")
    protected: tuple[str, ...] = Field((), description="patterns of layers that are kept")
    allowed: dict[str, tuple[str, ...]] = Field(
        {}, description="pattern -> schemes that its layers may have"
    )
    formats: int | None = Field(
        None, ge=0, description="at most so many formats in the plan, keep not counted"
    )
    target: str | None = Field(
        None,
        description="one of `qsearch list exporters`: choices and fused layers are what that tool can carry out",
    )
    seconds: float = Field(60.0, gt=0, description="time limit of the solver")
    layers: dict[str, str] = Field(
        {},
        description="a plan by hand instead of a budget: pattern -> scheme, the first pattern that matches a layer counts",
    )
    inputs: dict[str, str] = Field(
        {},
        description="pattern -> what is added to the schemes of its layers, e.g. '+a8t~bos'; the first that matches counts",
    )
    refine: int = Field(
        0,
        ge=0,
        description="rounds of refinement on the model itself; for plans that minimise noise alone",
    )

    @property
    def budget(self) -> Budget:
        """The limits as a `Budget`."""
        return Budget(
            self.average_bits,
            self.bytes,
            self.bit_operations,
            self.activation_bytes,
            self.latency,
            self.groups,
        )

    @property
    def objective(self) -> Objective:
        """What is minimised, and which losses are limited."""
        return Objective(self.weights or {self.metric: 1.0}, self.at_most, self.decibels)

    @property
    def constraints(self) -> Constraints:
        """What must hold besides the budget."""
        return Constraints(self.tied, self.fused, self.protected, self.allowed, self.formats)


class CalibrateSection(_Section):
    """Calls on which methods, transforms and static ranges choose, where a scheme asks for them: the first prompts, with noise of their own."""

    samples: int | None = Field(None, ge=2, description="prompts; those of profiling when left out")
    bins: int = Field(4, ge=1, description="step bins; the call in the middle of each is recorded")
    batch: int = Field(4, ge=1, description="samples in one call")


class ReconstructSection(_Section):
    """Rounding and input ranges of the plan learnt block by block before it is measured, where its schemes say @adaround or @adaround_scaled."""

    order: Literal["none", "separate", "joint"] = Field(
        "none", description="weights first and input ranges after, or both at once"
    )
    steps: int = Field(200, ge=1, description="of Adam for each block")
    rate: float = Field(3e-2, gt=0, description="learning rate of gates")
    input_rate: float = Field(
        5e-3, gt=0, description="learning rate of the factors on input ranges"
    )


class EvaluateSection(_Section):
    """Which plans are measured, on what, by which metrics."""

    samples: int = Field(96, ge=3, description="captions, each with its own noise")
    metrics: tuple[str, ...] = Field(
        ("sqnr", "ssim", "frechet", "alignment"), description="plug-ins of `qsearch list metrics`"
    )
    uniform: str | None = Field(
        "uint4-c", description="scheme of the uniform plan beside ours; none leaves it out"
    )
    random: int = Field(1, ge=0, description="random plans of the same size beside ours")


class Config(_Section):
    """A whole run. `folder`: where its files go; runs/NAME of the config file when left out."""

    model: str
    folder: Path | None = None
    seed: int = Field(0, ge=0)
    device: str = Field("cpu", description="torch device")
    prompts: Path | None = Field(
        None, description="text file, one prompt a line; without it, captions of the zoo's scenes"
    )
    sampling: SamplingSection = SamplingSection()
    profile: ProfileSection = ProfileSection()
    calibrate: CalibrateSection = CalibrateSection()
    allocate: AllocateSection = AllocateSection()
    reconstruct: ReconstructSection = ReconstructSection()
    evaluate: EvaluateSection = EvaluateSection()


def parse(content: Any, source: str) -> Config:
    """Config from plain data. Raises `QSearchError` naming the key, what was given, and the nearest known key."""
    if not isinstance(content, dict):
        raise QSearchError(
            f"{source} must hold a mapping of sections, it holds {type(content).__name__}"
        )
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            section: Any = Config
            for part in first["loc"][:-1]:
                section = section.model_fields[str(part)].annotation
            raise QSearchError(
                f"{source}: unknown key {place!r}{nearest(str(first['loc'][-1]), section.model_fields)}"
            ) from None
        raise QSearchError(
            f"{source}: {place}: {first['msg'].lower()}; given {first.get('input')!r}"
        ) from None
    _check(config, source)
    return config


def _check(config: Config, source: str) -> None:
    """What types can't say, and nobody wants to hear after minutes of profiling: schemes that parse, plug-ins that exist, a budget with a limit."""
    profile, evaluate = config.profile, config.evaluate
    questions: dict[str, Callable[[], object]] = {
        "profile.schemes": lambda: [Scheme.parse(s) for s in profile.schemes],
        "profile.estimator": lambda: plugins.check("estimators", profile.estimator),
        "profile.metrics": lambda: _check_metrics(profile),
        "allocate": lambda: (
            config.allocate.budget,
            config.allocate.objective,
            config.allocate.constraints,
        ),
        "allocate.refine": lambda: _check_refinement(config.allocate),
        "allocate.allowed": lambda: [
            Scheme.parse(s) for schemes in config.allocate.allowed.values() for s in schemes
        ],
        "allocate.target": lambda: (
            config.allocate.target and plugins.check("exporters", config.allocate.target)
        ),
        "allocate.layers": lambda: [Scheme.parse(s) for s in config.allocate.layers.values()],
        "allocate.inputs": lambda: [input_part(s) for s in config.allocate.inputs.values()],
        "allocate.solver": lambda: plugins.check("solvers", config.allocate.solver),
        "evaluate.metrics": lambda: [plugins.check("metrics", m) for m in evaluate.metrics],
        "evaluate.uniform": lambda: evaluate.uniform and Scheme.parse(evaluate.uniform),
    }
    for place, ask in questions.items():
        try:
            ask()
        except QSearchError as error:
            raise QSearchError(f"{source}: {place}: {error}") from None


def _check_refinement(section: AllocateSection) -> None:
    if section.refine and (
        section.decibels or section.at_most or set(section.objective.weights) != {"noise"}
    ):
        raise QSearchError(
            "refinement measures the noise of the denoiser's output, and minimises it alone; leave weights, at_most and decibels out, or refine"
        )


def _check_metrics(profile: ProfileSection) -> None:
    for pattern, metric in profile.score.items():
        if metric not in profile.metrics:
            raise QSearchError(
                f"score: {pattern!r} is scored by {metric!r}, which is not among profile.metrics{nearest(metric, profile.metrics)}"
            )
    for metric in profile.metrics:
        if metric == "noise" and profile.mode == "trajectory":
            raise QSearchError(
                "noise is that of one call of the denoiser; of a whole trajectory measure sqnr, the same of the final latents"
            )
        if metric != "noise":
            plugins.check("metrics", metric)


def load(path: Path) -> Config:
    """Config of a YAML file; `folder` is filled in."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QSearchError(f"{path} does not exist{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QSearchError(
            f"{path} is not readable as YAML: {str(error).splitlines()[0]}"
        ) from error
    config = parse(content if content is not None else {}, str(path))
    return (
        config if config.folder else config.model_copy(update={"folder": Path("runs") / path.stem})
    )


def save(config: Config, path: Path) -> None:
    """Write a config so that `load` gives it back."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _neighbours(path: Path) -> str:
    found = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return nearest(str(path), found) if found else ""
