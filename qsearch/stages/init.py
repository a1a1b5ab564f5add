"""init: a short commented config for a model of one's own and for this machine, with a file of
prompts to fill in.

Nothing is loaded: what fits is read from the pipeline's small files and from the headers of its
weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field

from ..core.artifacts import write_text
from ..core.errors import QSearchError
from ..core.graph import LayerSpec
from ..core.settings import Settings
from ..core.units import duration, number_of, size_of
from .announce import settings_lines
from .checks import check_device, check_run
from .config import DTYPES, load, parse
from .estimates import Estimate, denoisers_in, estimates
from .folder import Run

#: prompts that are written to be filled in
_PROMPTS = 16
#: scheme of the uniform plan beside ours is the one whose bits lie nearest to these
_USUAL_BITS = 4
_HEADER = """\
# {name}: {kind}, {weights} weights to quantize.
# Every key has a default (`qsearch show RUN`); these are the ones worth changing.
# `qsearch run {file}` does the whole job and can be interrupted; the same command resumes it.
"""


class InitSettings(Settings):
    """Which model, for which tool, and where the config goes."""

    model: str = Field(description="name of the zoo, local diffusers folder or hub id")
    output: Path | None = Field(None, description="the config; NAME.yaml when left out")
    target: str | None = Field(None, description="one of `qsearch list exporters`")
    prompts: Path | None = Field(None, description="text file, one prompt a line")
    device: str | None = None
    dtype: str | None = None
    force: bool = Field(False, description="take the place of an existing config")


@dataclass(frozen=True)
class Started:
    """What `init` made. `run`: the run by that config; `files`: what was written; `estimates`: what
    each verb takes.
    """

    run: Run
    files: tuple[Path, ...]
    estimates: tuple[Estimate, ...]
    lines: tuple[str, ...]


def init(settings: InitSettings) -> Started:
    """Write the config and its prompts.

    Raises:
        QSearchError: a folder that is no pipeline, files that are there already, an unknown tool,
            prompts that can't be read; nothing is written then.
    """
    from ..execute.offers import ladder, offers
    from ..measure.prompts import read_prompts
    from .config import Config

    if settings.target is not None:
        from ..execute.exports import exporter

        exporter(settings.target)
    name = Path(settings.model).resolve().name if Path(settings.model).is_dir() else settings.model
    stem = name.rpartition("/")[2]
    path = settings.output or Path(f"{stem}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise QSearchError(f"a config is a YAML file, e.g. {stem}.yaml; given --output {path}")
    own_prompts = path.with_suffix(".prompts.txt")
    where = Path(settings.model)
    model = str(where.resolve()) if where.is_dir() else settings.model
    probe = Run(Config(model=model, folder=path.with_suffix("")))
    folder, own = probe.model_folder, probe.own  # a wrong name is said before anything is written
    writes_prompts = settings.prompts is None and not own.zoo
    for file in (path, *([own_prompts] if writes_prompts else [])):
        if file.exists() and not settings.force:
            raise QSearchError(
                f"{file} exists and would be overwritten; give --force, or another file with -o"
            )
    if settings.prompts is not None:
        read_prompts(settings.prompts)
    layers = layers_in(folder)
    schemes = [str(offer.scheme) for offer in ladder(offers(settings.target, layers or ()))]
    if settings.target is None or not schemes:
        schemes = list(probe.config.profile.schemes)
    text = _text(settings, probe, path, layers, schemes)
    # a mistake is said before anything is written
    check_device(Run(parse(yaml.safe_load(text), "qsearch init", path.parent)))
    if writes_prompts:
        from ..measure.prompts import SHIPPED

        lines = SHIPPED.read_text(encoding="utf-8").splitlines()[:_PROMPTS]
        write_text(own_prompts, "\n".join(lines) + "\n")
    write_text(path, text)
    run = Run(load(path))
    check_run(run)
    made = (path, own_prompts) if writes_prompts else (path,)
    told = settings_lines(run, "profile", "evaluate")
    return Started(run, made, tuple(estimates(run)), tuple(told))


def layers_in(folder: Path) -> list[LayerSpec]:
    """The denoiser's linear layers and convolutions, by the headers of its weights."""
    from ..measure.sizes import tensors_in

    found = []
    for part in denoisers_in(folder):
        for name, shape in tensors_in(folder / part):
            kind = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(len(shape))
            if kind is not None and name.endswith(".weight") and "embedder_1d" not in name:
                found.append(LayerSpec(name.removesuffix(".weight"), "", kind, tuple(shape), 0))
    return found


def least_bits(layers: Sequence[LayerSpec], target: str | None, schemes: Sequence[str]) -> float:
    """Stored bits a weight of the smallest plan: each layer in the smallest scheme that the tool
    has for it.
    """
    from ..core import plugins
    from ..core.cost import can_have
    from ..core.scheme import KEEP, Scheme

    plugin = None if target is None else plugins.load("exporters", target)
    parsed = [Scheme.parse(s) for s in schemes]
    bits = weights = 0
    for layer in layers:
        fitting = [s for s in parsed if can_have(layer, s)]
        able = [KEEP] + [s for s in fitting if plugin is None or plugin.nearest(s, layer) == s]
        bits += min(s.stored_bits(layer.weight_shape) for s in able)
        weights += layer.weights
    return bits / weights if weights else 2.0


def _text(
    settings: InitSettings,
    probe: Run,
    path: Path,
    layers: Sequence[LayerSpec],
    schemes: Sequence[str],
) -> str:
    from ..core.scheme import Scheme

    own, s = probe.own, probe.sampling
    size = own.sized(s)
    least = least_bits(layers, settings.target, schemes)
    budget = 4.0 if least < 3.5 else min(16.0, math.ceil((least + 0.6) * 4) / 4)
    usual = min(schemes, key=lambda t: (abs(Scheme.parse(t).bits - _USUAL_BITS), schemes.index(t)))
    count = sum(layer.weights for layer in layers)
    model = probe.config.model
    lines = [
        _HEADER.format(
            name=probe.model_name,
            kind=own.kind or "a pipeline",
            weights=number_of(count) if count else "some",
            file=path,
        ).rstrip(),
        f"model: {_quoted(model)}",
        f"folder: {_quoted(str(Path('runs') / path.stem))}  # for the run's files, beside this one",
    ]
    if settings.prompts is not None:
        lines.append(f"prompts: {_quoted(str(settings.prompts.resolve()))}")
    elif not own.zoo:
        lines.append(
            f"prompts: {_quoted(path.with_suffix('.prompts.txt').name)}"
            "  # one a line; put in what your model is for"
        )
    device, dtype = settings.device or probe.device, settings.dtype or _dtype(probe)
    lines += [
        f"device: {device}",
        f"dtype: {dtype}  # {', '.join(DTYPES[:3])}",
        "sampling:",
        f"  steps: {s.steps}  # {own.why}",
        f"  guidance: {s.guidance:g}",
    ]
    if size is not None and own.makes in ("pictures", "videos") and not own.zoo:
        lines += [f"  height: {size[0]}", f"  width: {size[1]}"]
    if own.frames and own.makes == "videos":
        lines.append(f"  frames: {own.frames}")
    lines.append(f"  batch: {s.batch}  # pictures at once")
    if missing := own.required:
        lines.append(
            f"  call: {{{missing[0]}: FILE}}  # the pipeline requires {', '.join(missing)}"
        )
    lines += [
        "profile:",
        f"  schemes: [{', '.join(schemes)}]"
        + (f"  # what {settings.target} has" if settings.target else ""),
        f"  bins: {probe.bins}  # ranges of sampler steps",
        f"  samples: {probe.config.profile.samples}",
        f"  probes: {probe.config.profile.probes}  # half as many take half the time",
        "allocate:",
        f"  average_bits: {budget:g}  # stored bits a weight, scales included",
    ]
    if settings.target is not None:
        lines.append(f"  target: {settings.target}")
    lines += [
        "evaluate:",
        f"  samples: {96 if own.zoo else 8}",
        f"  metrics: [{', '.join(probe.metrics)}]",
        f"  uniform: {usual}  # the plan beside ours that gives every layer the same",
    ]
    return "\n".join(lines) + "\n"


def _dtype(probe: Run) -> str:
    """float32 where it fits the memory with the gradients of profiling, else bfloat16."""
    from ..measure.sizes import components_in, free_memory

    free = free_memory()
    if free is None or probe.device != "cpu":
        return "float32"
    parts = components_in(probe.model_folder)
    denoiser = sum(parts[n].parameters for n in denoisers_in(probe.model_folder) if n in parts)
    whole = sum(held.parameters for held in parts.values()) + denoiser
    return "float32" if 4 * whole < 0.9 * free else "bfloat16"


def _quoted(text: str) -> str:
    """A text as YAML reads it back."""
    return str(yaml.safe_dump(text, allow_unicode=True, width=10**6).splitlines()[0])


def shown(made: Started) -> list[str]:
    """What `init` made, line by line, with the next commands."""
    run, first = made.run, made.files[0]
    told = [f"wrote {', '.join(map(str, made.files))}", *made.lines]
    offload = run.offload.kind
    for e in made.estimates:
        passes = f"{e.passes:,} passes, " if e.passes else ""
        memory = size_of(e.memory[offload])
        told.append(f"  {e.verb}: about {duration(e.seconds)}, {passes}{memory} of memory")
    target = run.config.allocate.target
    told.append(f"next: qsearch run {first}")
    told.append(f"then: qsearch export {run.folder} --to {target or 'torchao'}")
    return told
