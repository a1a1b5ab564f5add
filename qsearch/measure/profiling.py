"""profile(model, graph, schemes, calls) -> SensitivityTable: what every choice at every layer
costs, resumable.

What an estimator has found is kept in a partial file beside the table while the work goes on, so
that a killed run continues where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import plugins
from ..core.attentions import PART, fault_of
from ..core.components import DECODERS
from ..core.cost import can_have
from ..core.errors import ArtifactError, QSearchError
from ..core.graph import OpGraph
from ..core.scheme import KEEP, Scheme
from ..core.settings import changed
from ..core.sites import allowed, cut, sites_of
from ..core.steps import StepRanges
from ..core.table import SensitivityTable, scorers
from .calls import measuring
from .decoding import tell_of_tiles
from .estimation import AbstractEstimator, EstimationTask, Part, PartialResult, Round
from .memory import checkpointing
from .observation import observations
from .options import ProfileOptions
from .pipelines import (
    Call,
    Prompts,
    Sampling,
    check_metrics,
    decoder_of,
    denoisers_of,
    frozen,
    latent_channels,
    model_of,
    needs,
    record,
)
from .placement import check_placement
from .quantized_weights import QuantizedWeights, calibrated_weights
from .trajectory import Trajectory, patched_parts, trajectories

Elsewhere = Callable[[list[Part]], Iterator[tuple[Part, Round]]]
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SAVE_SECONDS = 10.0
_SAVE_SHARE = 0.05  # of the time goes into saving unfinished work, however large its table


@dataclass(frozen=True)
class ProfileWork:
    """What profiling is given besides options.

    `pipe`: the pipeline, which decodes pictures for the metrics that look at them; `sampling`: how
    it made the calls, whose sizes it decodes by.
    `calibration`: recorded calls by which methods, static ranges and transforms choose; left out,
    they choose by the calls that are priced, and what they gain looks better than it is.
    `weights`: in its place, what `calibrated_weights` made, which keeps every weight that is
    quantized here: for several calls with slow methods on a model that is not large.
    `partial`: file for unfinished work; what it holds with the same `key` is not measured again.
    `progress(done, total)` is called as it goes, `say` with a line on passes and memory before.
    `parted`: makes `elsewhere`, which does rounds of probes in other processes (`parted.py`), from
    prompts, batch, calls and options.
    """

    pipe: Any = None
    sampling: Sampling | None = None
    calibration: Sequence[Call] = ()
    weights: QuantizedWeights | None = None
    partial: Path | None = None
    key: str = ""
    progress: Callable[[int, int], None] | None = None
    say: Callable[[str], None] | None = None
    parted: Callable[[Prompts, int, Any, ProfileOptions], Elsewhere] | None = None
    elsewhere: Elsewhere | None = None

    def tell(self, line: str) -> None:
        """A line, to whoever listens."""
        if self.say is not None:
            self.say(line)


def profile(
    model: nn.Module,
    graph: OpGraph,
    schemes: Sequence[Scheme | str],
    calls: Sequence[Call] | Sequence[Trajectory],
    options: ProfileOptions | None = None,
    work: ProfileWork | None = None,
    **named: Any,
) -> SensitivityTable:
    """Sensitivity of each quantizable layer to each scheme, by each metric.

    Calls of one sampler step are parts of one step bin. Metrics other than `noise` look at the
    predicted clean image and need calls that a pipeline recorded; those that look at pictures need
    `work.pipe`. After `options.budget_seconds` the work stops with what there is, where every
    choice has a value by then.

    Args:
        model: the denoiser, as it is before anything is quantized.
        graph: its graph.
        schemes: choices for each layer.
        calls: recorded calls, or whole trajectories.
        options: estimator, metrics, probes and the like; defaults when left out.
        work: pipeline, calibration, where unfinished work is kept, who is told.
        named: fields of `options` and `work` by their names, e.g. `probes=8, pipe=pipe`.

    Returns:
        The table: a row a site, scheme, step bin and metric, with standard errors.

    Raises:
        QSearchError: for options that contradict what is given.
    """
    asked, given = _split(options, work, named)
    choices = tuple(dict.fromkeys(Scheme.parse(s) for s in schemes))
    plugin: AbstractEstimator = plugins.load("estimators", asked.estimator)
    if not choices or (plugin.needs_calls and not calls):
        raise QSearchError("profiling needs at least one scheme and one recorded call")
    with questioned(model, graph, choices, calls, asked, given) as task:
        sites = [*task.choices]
        scoring = scorers(graph, asked.score, sites, asked.metrics) if asked.score else {}
        if given.say is not None:  # seeing what a backward takes costs a pass
            given.tell(f"profile: {asked.estimator} takes {plugin.plan(task)}")
        answer = _work(plugin, task, given, asked.budget_seconds)
    table = answer.table()
    _check_whole(task, answer, table, asked, given)
    return table.scored(scoring) if scoring else table


@contextmanager
def questioned(
    model: nn.Module,
    graph: OpGraph,
    choices: tuple[Scheme, ...],
    calls: Sequence[Call] | Sequence[Trajectory],
    asked: ProfileOptions,
    given: ProfileWork,
) -> Iterator[EstimationTask]:
    """The question that estimators answer, while its model is ready for them."""
    task = _task(model, graph, choices, calls, asked, given)
    watched = [c for c in calls if isinstance(c, Trajectory)]
    with (
        measuring(model),
        frozen(watched[0].pipe if watched else given.pipe, model),
        checkpointing(model, asked.checkpointing),
        _autocast(model, asked.autocast),
    ):
        yield task


def profile_pipeline(
    pipe: Any,
    graph: OpGraph,
    prompts: Prompts,
    sampling: Sampling,
    options: ProfileOptions | None = None,
    work: ProfileWork | None = None,
    **named: Any,
) -> SensitivityTable:
    """`profile` for the components of a diffusers pipeline that are in the graph, on calls of its
    own.

    `options.mode`: `step` records the denoiser's calls, `trajectory` prices through the whole
    sampler. `options.batch` samples run at once; where they don't fit the device's memory, half of
    them, and so on.

    Args:
        pipe: the pipeline.
        graph: its denoiser's graph.
        prompts: what is sampled.
        sampling: how.
        options: as in `profile`; here schemes, bins, batch and mode count too.
        work: as in `profile`.
        named: fields of `options` and `work` by their names.

    Returns:
        The sensitivity table.

    Raises:
        QSearchError: as `profile`, and where one sample does not fit the memory.
    """
    asked, given = _split(options, work, named)
    model, batch = model_of(pipe, graph.components), asked.batch
    check_placement(pipe, model, given.tell)
    tell_of_tiles(pipe, given.tell)
    check_metrics(pipe, asked.metrics, sampling, prompts)
    check_reached(pipe, graph.components, asked)
    while True:
        try:
            calls: Any = (
                trajectories(pipe, prompts, sampling, batch)
                if asked.mode == "trajectory"
                else record(pipe, prompts, sampling, asked.bins, batch, graph.components)
            )
            made = replace(given, pipe=pipe, sampling=sampling)
            if given.parted is not None:
                made = replace(made, elsewhere=given.parted(prompts, batch, calls, asked))
            return profile(model, graph, asked.schemes, calls, asked, made)
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise QSearchError(
                    f"one sample at a time does not fit the memory of {model.device}; "
                    "give another device"
                ) from error
            batch = -(-batch // 2)
            given.tell(f"profile: out of memory; going on with {batch} samples at once")


def check_reached(pipe: Any, components: Sequence[str], asked: ProfileOptions) -> None:
    """Refuse what prices no text encoder and no VAE, before anything is measured.

    Args:
        pipe: the pipeline.
        components: those of the graph.
        asked: mode, metrics and estimator.

    Raises:
        QSearchError: recorded calls of the denoiser reach no other component; a metric of latents
            does not depend on the VAE.
    """
    others = [name for name in components if name not in denoisers_of(pipe)]
    if not others or not plugins.load("estimators", asked.estimator).needs_calls:
        return
    if asked.mode != "trajectory":
        raise QSearchError(
            f"recorded calls of the denoiser reach nothing of {', '.join(others)}: set "
            "profile.mode to trajectory, which "
            "goes through the whole pipeline"
        )
    blind = [m for m in asked.metrics if not needs(plugins.load("metrics", m), "pictures")]
    decoders = [name for name in others if name in DECODERS]
    if decoders and blind:
        raise QSearchError(
            f"{', '.join(decoders)} is priced by metrics of decoded pictures, such as psnr and "
            "ssim; "
            f"{', '.join(blind)} looks at latents: take it out of profile.metrics, or the "
            "component out of components"
        )


def _split(
    options: ProfileOptions | None, work: ProfileWork | None, named: Mapping[str, Any]
) -> tuple[ProfileOptions, ProfileWork]:
    """Options and work with what was given by name in its place."""
    beside = {f.name for f in fields(ProfileWork)}
    asked = {name: value for name, value in named.items() if name not in beside}
    given = {name: value for name, value in named.items() if name in beside}
    return changed(options, ProfileOptions, asked), replace(work or ProfileWork(), **given)


def _task(
    model: nn.Module,
    graph: OpGraph,
    choices: tuple[Scheme, ...],
    calls: Sequence[Call] | Sequence[Trajectory],
    asked: ProfileOptions,
    given: ProfileWork,
) -> EstimationTask:
    decoder = None if given.pipe is None else decoder_of(given.pipe, given.sampling)
    plain = [c for c in calls if isinstance(c, Call)]
    channels = 0 if given.pipe is None else latent_channels(given.pipe)
    watched = [t.observed(model, asked.metrics) for t in calls if isinstance(t, Trajectory)]
    seen = watched or observations(model, plain, asked.metrics, decoder, channels)
    attentions, whole = _attentions(graph, asked, bool(watched))
    wanted = {x.name: tuple(s for s in choices if can_have(x, s)) for x in graph.quantizable}
    calibrated = given.weights or calibrated_weights(
        model, graph, wanted | dict.fromkeys(whole, attentions), given.calibration or plain
    )
    tensors = [x for x in sites_of(graph, asked.sites) if cut(x)[1] != PART] if asked.sites else []
    if asked.sites and not any(allowed(x, s) for x in tensors for s in choices):
        raise QSearchError(
            "sites of attention are rounded and store nothing: give a scheme such as keep+a8 "
            f"beside {', '.join(map(str, choices))}"
        )
    return EstimationTask(
        model,
        graph,
        choices,
        tuple(seen),
        asked.metrics,
        asked.probes,
        asked.seed,
        calibrated,
        (*tensors, *whole),
        attentions,
        StepRanges.equal(asked.attention_ranges or 1),
        shared=given.weights is not None,
        elsewhere=given.elsewhere,
    )


def _attentions(
    graph: OpGraph, asked: ProfileOptions, trajectory: bool
) -> tuple[tuple[Scheme, ...], list[str]]:
    """(choices for whole attentions, the sites that get them)."""
    if not asked.attentions:
        return (), []
    choices = tuple(s for s in map(Scheme.parse, asked.attentions) if s.attention)
    sites = [x for x in sites_of(graph, asked.attention_sites) if cut(x)[1] == PART]
    for text in asked.attentions:
        if not (scheme := Scheme.parse(text)).attention and scheme != KEEP:
            raise QSearchError(
                "attentions take choices of `qsearch list attentions`, such as "
                f"window8~rettention; given {text!r}"
            )
    for scheme in choices:
        faults = [fault_of(graph.self_attentions[cut(x)[0]], scheme) for x in sites]
        if all(faults):
            first = f"{sites[0]}: {faults[0]}" if sites else f"{graph.model} has no self-attention"
            raise QSearchError(f"no attention can have {scheme}; {first}")
        if scheme.carried and not trajectory:
            raise QSearchError(
                f"{scheme} carries statistics from step to step, which a recorded call of one "
                "step has not: profile with "
                "mode trajectory (and metrics of final latents, such as sqnr)"
            )
    return choices, sites


def _check_whole(
    task: EstimationTask,
    answer: PartialResult,
    table: SensitivityTable,
    asked: ProfileOptions,
    given: ProfileWork,
) -> None:
    wanted, found = task.count, len(table.frame[["site", "scheme"]].drop_duplicates())
    limit = asked.budget_seconds
    if found < wanted and (limit is None or answer.done >= answer.total):
        raise QSearchError(
            f"{asked.estimator} prices {found} of the {wanted} choices that are asked for: leave "
            "sites of attention out, or take the estimator probe"
        )
    if found < wanted:
        raise QSearchError(
            f"after {limit:g} s {found} of {wanted} choices are measured; give more time (what is "
            "done is kept), fewer schemes, or the estimator probe"
        )
    if answer.done < answer.total:
        given.tell(
            f"profile: stopped after {limit:g} s with {answer.done} of {answer.total} parts of "
            "the work; error bars are wider for it"
        )


@contextmanager
def _autocast(model: nn.Module, kind: str) -> Iterator[None]:
    if not kind:
        yield
        return
    device = next(model.parameters()).device.type

    def cast(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, _TYPES[kind]):
            return forward(*args, **kwargs)

    with patched_parts(model, cast):
        yield


def _work(
    plugin: AbstractEstimator, task: EstimationTask, given: ProfileWork, budget: float | None
) -> PartialResult:
    began = saved = time.monotonic()
    wait, answer = _SAVE_SECONDS, None
    earlier = _resume(given.partial, task.graph, given.key)
    for answer in plugin.estimate(task, earlier):
        if given.progress is not None:
            given.progress(answer.done, answer.total)
        now = time.monotonic()
        out_of_time = budget is not None and now - began > budget
        if given.partial is not None and (now - saved > wait or out_of_time):
            answer.table().save(given.partial, key=given.key, seed=task.seed)
            saved = time.monotonic()
            wait = max(_SAVE_SECONDS, (saved - now) / _SAVE_SHARE)
        if out_of_time:
            break
    assert answer is not None, "an estimator answers at least once"
    return answer


def _resume(partial: Path | None, graph: OpGraph, key: str) -> SensitivityTable | None:
    if partial is None or not partial.exists():
        return None
    try:
        table = SensitivityTable.load(partial, graph.id)
    except ArtifactError:
        return None
    return table if table.header is not None and table.header.key == key else None
