"""profile(model, graph, schemes, calls) -> SensitivityTable: what every choice at every layer costs, resumable.

What an estimator has found is kept in a partial file beside the table while the work goes on, so that a killed run continues where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import plugins
from ..core.errors import ArtifactError, QSearchError, nearest
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.sites import allowed, sites_of
from ..core.table import SensitivityTable, scorers
from .observation import NOISE, observations
from .pipelines import (
    Call,
    Prompts,
    Sampling,
    decode_batch,
    denoiser_of,
    frozen,
    latent_channels,
    record,
)
from .question import AbstractEstimator, Answer, Question
from .simulation import QuantizedWeights, calibrated_weights
from .trajectory import Trajectory, patched, trajectories

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SAVE_SECONDS = 10.0
_SAVE_SHARE = 0.05  # of the time goes into saving unfinished work, where a table is so large that it takes long


def profile(
    model: nn.Module,
    graph: OpGraph,
    schemes: Sequence[Scheme | str],
    calls: Sequence[Call] | Sequence[Trajectory],
    *,
    estimator: str = "probe",
    metrics: Sequence[str] = (NOISE,),
    probes: int = 24,
    pipe: Any = None,
    seed: int = 0,
    partial: Path | None = None,
    key: str = "",
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    budget_seconds: float | None = None,
    checkpointing: bool = False,
    calibration: Sequence[Call] = (),
    weights: QuantizedWeights | None = None,
    sites: Sequence[str] = (),
    score: Mapping[str, str] | None = None,
    autocast: str = "",
) -> SensitivityTable:
    """Sensitivity of each quantizable layer to each scheme, by each metric, at each recorded call or along whole trajectories.

    Calls of one sampler step are parts of one step bin. Metrics other than `noise` look at the predicted clean image and need calls that a pipeline
    recorded; those that look at pictures need `pipe`, whose VAE decodes them. `probes`: random vectors, for the estimators that use them.
    `partial`: file for unfinished work; what it holds with the same `key` is not measured again. `progress(done, total)` is called as it goes,
    `say` with a line on passes and memory before. `calibration`: recorded calls by which methods, static ranges and transforms choose; left out,
    they choose by `calls`, and what they gain is seen with a kind eye. `weights`: in its place, what `calibrated_weights` made, which keeps every
    weight that is quantized here: for several calls with slow methods on a model that is not large. `sites`: patterns of attention's sites (`core/sites.py`), which get those of
    the schemes that round inputs alone. `score`: pattern of layers -> the metric that scores them, in one more column, `scored`. `autocast`: type
    that the denoiser computes in where torch thinks it safe (bfloat16, float16). `checkpointing`: backwards compute each block again instead of
    keeping its activations. After `budget_seconds` the work stops with what there is, where every choice has a value by then.
    """
    choices = tuple(Scheme.parse(s) for s in schemes)
    plugin: AbstractEstimator = plugins.load("estimators", estimator)
    if not choices or (plugin.needs_calls and not calls):
        raise QSearchError("profiling needs at least one scheme and one recorded call")
    if probes < 2:
        raise QSearchError(f"an error bar needs two probes; given {probes}")
    decoder = None if pipe is None else bound(decode_batch, pipe)
    watched = [c for c in calls if isinstance(c, Trajectory)]
    seen = [t.observed(model, metrics) for t in watched] or observations(
        model,
        [c for c in calls if isinstance(c, Call)],
        metrics,
        decoder,
        0 if pipe is None else latent_channels(pipe),
    )
    chosen_by = calibration or [c for c in calls if isinstance(c, Call)]
    calibrated = weights or calibrated_weights(
        model, graph, {layer.name: choices for layer in graph.quantizable}, chosen_by
    )
    found_sites = sites_of(graph, sites) if sites else ()
    question = Question(
        model,
        graph,
        choices,
        tuple(seen),
        tuple(metrics),
        probes,
        seed,
        calibrated,
        found_sites,
        shared=weights is not None,
    )
    if sites and not any(allowed(s) for s in choices):
        raise QSearchError(
            f"sites of attention are rounded and store nothing: give a scheme such as keep+a8 beside {', '.join(map(str, choices))}"
        )
    scoring = scorers(graph, score, [*question.choices], metrics) if score else {}
    with (
        frozen(watched[0].pipe if watched else pipe),
        _checkpointing(model, checkpointing),
        _autocast(model, autocast),
    ):
        if say is not None:
            say(f"profile: {estimator} takes {plugin.plan(question)}")
        answer = _work(
            plugin, question, _resume(partial, graph, key), partial, key, progress, budget_seconds
        )
    table = answer.table()
    wanted, found = question.count, len(table.frame[["site", "scheme"]].drop_duplicates())
    if found < wanted:
        raise QSearchError(
            f"after {budget_seconds:g} s {found} of {wanted} choices are measured; give more time (what is done is kept), fewer schemes, or the estimator probe"
        )
    if answer.done < answer.total and say is not None:
        say(
            f"profile: stopped after {budget_seconds:g} s with {answer.done} of {answer.total} parts of the work; error bars are wider for it"
        )
    return table.scored(scoring) if scoring else table


def profile_pipeline(
    pipe: Any,
    graph: OpGraph,
    schemes: Sequence[Scheme | str],
    prompts: Prompts,
    sampling: Sampling,
    *,
    bins: int = 3,
    batch: int = 2,
    mode: str = "step",
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> SensitivityTable:
    """`profile` for the denoiser of a diffusers pipeline, on its own recorded calls (mode `step`) or through its whole sampler (`trajectory`).

    `batch` samples run at once; where they don't fit the device's memory, half of them, and so on. `settings` are those of `profile`.
    """
    model, whole = denoiser_of(pipe), mode == "trajectory"
    while True:
        try:
            calls: Any = (
                trajectories(pipe, prompts, sampling, batch)
                if whole
                else record(pipe, prompts, sampling, bins, batch)
            )
            return profile(model, graph, schemes, calls, pipe=pipe, say=say, **settings)
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise QSearchError(
                    f"one sample at a time does not fit the memory of {model.device}; give another device"
                ) from error
            batch = -(-batch // 2)
            if say is not None:
                say(f"profile: out of memory; going on with {batch} samples at once")


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise QSearchError(
            f"checkpointing is built into diffusers' models; {type(model).__name__} has none, profile without it"
        )
    switch: Any = model
    switch.enable_gradient_checkpointing()
    try:
        yield
    finally:
        switch.disable_gradient_checkpointing()


@contextmanager
def _autocast(model: nn.Module, kind: str) -> Iterator[None]:
    if not kind:
        yield
        return
    if kind not in _TYPES:
        raise QSearchError(
            f"autocast computes in {' or '.join(_TYPES)}; given {kind!r}{nearest(kind, _TYPES)}"
        )
    device = next(model.parameters()).device.type

    def cast(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, _TYPES[kind]):
            return forward(*args, **kwargs)

    with patched(model, cast):
        yield


def _work(
    plugin: AbstractEstimator,
    question: Question,
    earlier: SensitivityTable | None,
    partial: Path | None,
    key: str,
    progress: Callable[[int, int], None] | None,
    budget: float | None,
) -> Answer:
    began = saved = time.monotonic()
    wait, answer = _SAVE_SECONDS, None
    for answer in plugin.estimate(question, earlier):
        if progress is not None:
            progress(answer.done, answer.total)
        now = time.monotonic()
        out_of_time = budget is not None and now - began > budget
        if partial is not None and (now - saved > wait or out_of_time):
            answer.table().save(partial, key=key, seed=question.seed)
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
