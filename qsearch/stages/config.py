"""Config: a whole run's settings, a section a verb; YAML that holds wherever one stands.

Everything has a default but the model, so that the shortest config is one line. Relative paths are
read from the config's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import Field

from ..core import plugins
from ..core.artifacts import write_text
from ..core.errors import QSearchError, nearest
from ..core.gates import gates_of
from ..core.scheme import Scheme, input_part
from ..core.settings import Settings, checked, field_names
from ..core.shipped import here
from ..measure.offloading import CHOICES
from ..measure.options import CalibrateOptions, ProfileOptions, ReconstructOptions
from ..measure.sampling import SamplingSettings
from .allocate import AllocateSettings
from .evaluate import EvaluateSettings
from .explain import ExplainSettings
from .fit import FitSettings
from .protocol import ProtocolSettings, with_protocol

#: what a run's own config is called
NAME = "config.yaml"
#: types that a model's weights are loaded in (`measure.loading.TYPES`, which imports torch)
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


class Config(Settings):
    """A whole run. `folder`: where its files go; runs/NAME of the config file when left out."""

    model: str
    folder: Path | None = None
    seed: int = Field(0, ge=0)
    device: str | None = Field(
        None,
        description="torch device; auto, as when left out: the GPU where there is one, else cpu",
    )
    dtype: str = Field(
        "auto",
        description="type of the model's weights while measuring; auto: that of the denoiser's "
        "files (float32 for fp16)",
    )
    offload: str = Field(
        "auto",
        description="none: all weights in memory; disk: they stay in their files and come a block "
        "at a time; block: they stay in RAM beside a GPU; auto: the first of none, block and disk "
        "that fits",
    )
    variant: str | None = Field(
        None,
        description="of the model's files, as diffusers names them (fp16); where a component has "
        "files of one variant alone, that one when left out",
    )
    components: tuple[str, ...] = Field(
        (),
        description="parts of the pipeline to plan, e.g. [transformer, text_encoder, vae]; "
        "its denoisers when left out",
    )
    prompts: Path | None = Field(
        None,
        description="text file, one prompt a line; without it, captions of the zoo's scenes for "
        "the zoo's models, a handful of neutral prompts for others",
    )
    sampling: SamplingSettings = SamplingSettings()
    profile: ProfileOptions = ProfileOptions()
    calibrate: CalibrateOptions = CalibrateOptions()
    allocate: AllocateSettings = AllocateSettings()
    reconstruct: ReconstructOptions = ReconstructOptions()
    evaluate: EvaluateSettings = EvaluateSettings()
    protocol: ProtocolSettings | None = Field(
        None,
        description="one of `qsearch list protocols`, which fixes prompts, seeds, sampler and "
        "metrics of evaluation",
    )
    gates: dict[str, str] = Field(
        {},
        description="metric -> limit that the plan must keep, such as lpips: '<= 0.15'; `qsearch "
        "evaluate` exits with 3 where it does not",
    )
    fit: FitSettings = FitSettings()
    explain: ExplainSettings = ExplainSettings()

    @property
    def first_prompts(self) -> int:
        """How many prompts of the file profiling and calibration take; evaluation has the next."""
        return max(self.profile.samples, self.calibrate.samples or 0)


def parse(content: Any, source: str, place: Path | None = None) -> Config:
    """Config from plain data.

    Args:
        content: the mapping of sections.
        source: where it was read, for errors.
        place: folder that relative paths start from; the working directory when left out.

    Returns:
        The config, with paths that hold wherever one stands.

    Raises:
        QSearchError: naming the key, what was given, and the nearest known key.
    """
    if not isinstance(content, dict):
        raise QSearchError(
            f"{source} must hold a mapping of sections, it holds {type(content).__name__}"
        )
    whole = with_protocol(_placed(content, place) if place else content, source)
    config = checked(Config, whole, source)
    _check(config, source)
    return config


def _placed(content: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The content with its relative paths read from `place`."""
    found = dict(content)
    for name in ("folder", "prompts"):
        if isinstance(found.get(name), str):
            found[name] = str(place / found[name])
    model, section = found.get("model"), found.get("allocate")
    protocol, evaluate = found.get("protocol"), found.get("evaluate")
    if isinstance(protocol, dict) and isinstance(protocol.get("prompts"), str):
        found["protocol"] = protocol | {"prompts": str(place / protocol["prompts"])}
    if isinstance(evaluate, dict) and isinstance(evaluate.get("real"), str):
        found["evaluate"] = evaluate | {"real": str(place / evaluate["real"])}
    if isinstance(model, str) and _is_here(place / model):
        found["model"] = str((place / model).resolve())
    if isinstance(section, dict) and str(section.get("device") or "").endswith(".json"):
        found["allocate"] = section | {"device": str(place / str(section["device"]))}
    return found


def _is_here(model: Path) -> bool:
    """Whether a model is a saved pipeline's folder, or a checkpoint in one file."""
    return (model / "model_index.json").is_file() or (model.suffix != ".yaml" and model.is_file())


def _check(config: Config, source: str) -> None:
    """What types can't express and must not come up after minutes of work: names, schemes,
    budgets.
    """
    profile, allocate, evaluate = config.profile, config.allocate, config.evaluate
    questions: dict[str, Callable[[], object]] = {
        "sampling": config.sampling.check,
        "dtype": lambda: _check_type(config.dtype),
        "offload": lambda: _check_offload(config.offload),
        "profile.schemes": lambda: [_scheme(s) for s in profile.schemes],
        "profile.attentions": lambda: [Scheme.parse(s) for s in profile.attentions],
        "profile.estimator": lambda: plugins.check("estimators", profile.estimator),
        "profile.metrics": lambda: _check_metrics(profile),
        "allocate": lambda: (allocate.budget, allocate.objective, allocate.constraints),
        "allocate.refine": allocate.check_refinement,
        "allocate.schedule": lambda: _check_schedule(config),
        "allocate.allowed": lambda: [
            _scheme(s) for schemes in allocate.allowed.values() for s in schemes
        ],
        "allocate.target": lambda: allocate.target and plugins.check("exporters", allocate.target),
        "allocate.sites": lambda: _parsed(allocate.sites),
        "allocate.layers": lambda: _parsed(allocate.layers),
        "allocate.inputs": lambda: [input_part(s) for s in allocate.inputs.values()],
        "allocate.solver": lambda: plugins.check("solvers", allocate.solver),
        "evaluate.metrics": lambda: [plugins.check("metrics", m) for m in evaluate.metrics or ()],
        "gates": lambda: _check_gates(config),
        "evaluate.uniform": lambda: evaluate.uniform and _scheme(evaluate.uniform),
        "fit.surrogate": lambda: plugins.check("surrogates", config.fit.surrogate),
    }
    for place, ask in questions.items():
        try:
            ask()
        except QSearchError as error:
            raise QSearchError(f"{source}: {place}: {error}") from None


def _parsed(spelt: Mapping[str, str | tuple[str, ...]]) -> list[Scheme]:
    """Every scheme in a section that may hold one for each range of steps."""
    texts = [[text] if isinstance(text, str) else list(text) for text in spelt.values()]
    return [_scheme(text) for held in texts for text in held]


def _scheme(text: str) -> Scheme:
    """A scheme whose method is there."""
    scheme = Scheme.parse(text)
    if scheme.method:
        plugins.check("quantizers", scheme.method)
    return scheme


def _check_schedule(config: Config) -> None:
    """Refuse a search for a schedule that nothing limits, or whose steps are given."""
    asked = config.allocate
    if not asked.schedule:
        return
    if asked.attention_share is None and asked.total_bit_operations is None:
        raise QSearchError(
            "a schedule of attentions is searched within `attention_share` or "
            "`total_bit_operations`; give one, or leave schedule out"
        )
    given = {"steps": asked.steps > 1, "layers": asked.layers, "refine": asked.refine}
    if wrong := [name for name, value in given.items() if value]:
        raise QSearchError(
            "a schedule has ranges of steps of its own, and starts from a plan for all steps: "
            f"leave {wrong[0]} out, or schedule"
        )
    if not config.profile.attentions:
        raise QSearchError("a schedule chooses among profile.attentions; there are none, give some")


def _check_gates(config: Config) -> None:
    measured = config.evaluate.metrics
    for gate in gates_of(config.gates):
        plugins.check("metrics", gate.metric)
        if measured is not None and gate.metric not in measured:
            raise QSearchError(
                f"{gate.metric} is not among evaluate.metrics, {', '.join(measured)}; add it there"
            )


def _check_type(dtype: str) -> None:
    known = ("auto", *DTYPES)
    if dtype not in known:
        raise QSearchError(
            f"a type of weights is one of {', '.join(known)}; given "
            f"{dtype!r}{nearest(dtype, known)}"
        )


def _check_offload(asked: str) -> None:
    if asked not in CHOICES:
        raise QSearchError(
            f"offload is one of {', '.join(CHOICES)}; given {asked!r}{nearest(asked, CHOICES)}"
        )


def _check_metrics(profile: ProfileOptions) -> None:
    for pattern, metric in profile.score.items():
        if metric not in profile.metrics:
            raise QSearchError(
                f"score: {pattern!r} is scored by {metric!r}, which is not among profile.metrics"
                f"{nearest(metric, profile.metrics)}"
            )
    for metric in profile.metrics:
        if metric == "noise" and profile.mode == "trajectory":
            raise QSearchError(
                "noise is that of one call of the denoiser; of a whole trajectory measure sqnr, "
                "the same of the final latents"
            )
        if metric != "noise":
            plugins.check("metrics", metric)


def load(path: Path) -> Config:
    """Config of a YAML file, or of a run's folder; `folder` is filled in: a run's own, of a file
    that names none runs/NAME.
    """
    path = here(Path(path))
    if path.is_file() and path.suffix not in (".yaml", ".yml") and (path.parent / NAME).is_file():
        raise QSearchError(f"{path} is a file; give the run's folder, such as {path.parent}")
    own = path if path.is_dir() else None
    path = path / NAME if own else path
    try:
        content = yaml.safe_load(path.read_bytes())  # UTF-8, or UTF-16 with its mark
    except FileNotFoundError:
        raise QSearchError(f"{path} does not exist{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QSearchError(
            f"{path} is not readable as YAML: {str(error).splitlines()[0]}"
        ) from error
    config = parse(content if content is not None else {}, str(path), path.parent)
    if config.folder:
        return config
    return config.model_copy(update={"folder": own or Path("runs") / path.stem})


def save(config: Config, path: Path) -> None:
    """Write a config so that `load` gives it back; its own folder is `.`, and moves with it.

    Settings at their default are left out; sections without any other stand there empty.
    """
    path = Path(path)
    content = config.model_dump(mode="json", exclude_unset=True)
    for name, field in Config.model_fields.items():
        if isinstance(field.default, Settings):
            content.setdefault(name, {})
    folder = config.folder
    if folder is not None:
        content["folder"] = os.path.relpath(folder.resolve(), path.parent.resolve())
    if config.prompts is not None:
        content["prompts"] = str(config.prompts.resolve())
    if (config.allocate.device or "").endswith(".json"):
        content["allocate"]["device"] = str(Path(str(config.allocate.device)).resolve())
    if _is_here(Path(config.model)):
        content["model"] = str(Path(config.model).resolve())
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def with_changes(config: Config, changes: Mapping[str, str]) -> Config:
    """A config with keys such as `allocate.bytes` set to YAML text; empty text is the default.

    Raises `QSearchError` for an unknown key and for a value that does not fit.
    """
    return changed(
        config,
        {key: _value(text) if text else None for key, text in changes.items()},
        "the settings",
    )


def changed(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """A config with keys such as `allocate.bytes` set to values; None is the default.

    Raises `QSearchError` for an unknown key and for a value that does not fit.
    """
    content = config.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        *sections, name = key.split(".")
        kind: Any = Config
        held = content
        for part in sections:
            _known(kind, part, key)
            kind = Config.model_fields[part].annotation
            held = held[part] if isinstance(held.get(part), dict) else {}
            content[part] = held
        _known(kind, name, key)
        if isinstance(value, str) and _is_list(kind, name):
            value = [word.strip() for word in value.split(",") if word.strip()]
        if value is None:
            held.pop(name, None)
        else:
            held[name] = value
    return parse(content, source)


def _is_list(kind: Any, name: str) -> bool:
    field = getattr(kind, "model_fields", {}).get(name)
    return field is not None and "tuple[" in str(field.annotation)


def _value(text: str) -> Any:
    """YAML's reading of a value; a limit such as `>= 0.9`, which YAML can't read, as it is."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _known(kind: Any, name: str, key: str) -> None:
    if get_origin(kind) is dict:
        return  # any name: a metric's gate, a layer's pattern
    if name not in field_names(kind):
        raise QSearchError(f"there is no setting {key!r}{nearest(name, field_names(kind))}")


def _neighbours(path: Path) -> str:
    if path.name == NAME and not path.parent.is_dir():  # a run's folder was given
        path, found = path.parent, [p.parent for p in path.parent.parent.glob(f"*/{NAME}")]
    else:
        found = list(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return nearest(str(path), [str(p) for p in found]) if found else ""
