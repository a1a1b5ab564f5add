"""Parted profiling: rounds of probes by the workers of an executor, put together as if one had made
them.

A round belongs to some prompts, a step bin and some probes, and depends on no other one: its shares
are stored where they belong, so that sums are the same in whatever order they come. The calls are
recorded once and travel to the workers; whole trajectories are run there.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from .estimation import Part, Round
from .estimators.probe import measure
from .executing import Do, ExecutorOptions, Say, Task, WorkerLost, execute
from .gradients import Contraction
from .options import ProfileOptions
from .pipelines import Call, Prompts, Sampling, load_pipeline, model_of
from .profiling import Elsewhere, ProfileWork, questioned
from .trajectory import trajectories


@dataclass(frozen=True)
class Parted:
    """What every worker needs to know of a profile.

    Attributes:
        folder: the saved pipeline.
        graph: its denoiser's graph.
        sampling: how it samples.
        device: torch device of the workers.
        dtype: type that the pipeline is loaded in.
        offload: where its weights stay, as `load_pipeline` takes it.
        calibration: recorded calls by which schemes choose.
    """

    folder: Path
    graph: OpGraph
    sampling: Sampling
    device: str = "cpu"
    dtype: str = "float32"
    offload: str = "none"
    calibration: Sequence[Call] = field(default=(), repr=False)

    def by(self, options: ExecutorOptions, say: Say) -> Any:
        """For `ProfileWork.parted`: rounds of probes by an executor's workers."""

        def made(prompts: Prompts, batch: int, calls: Any, asked: ProfileOptions) -> Elsewhere:
            if asked.estimator != "probe":
                raise QSearchError(
                    f"the rounds of the estimator probe are parted between workers; "
                    f"{asked.estimator} works in one process: leave the executor out"
                )
            recorded = b"" if asked.mode == "trajectory" else _packed(calls)
            chosen_by = _packed(self.calibration)
            begin = partial(_begin, _Work(self, prompts, batch, asked, recorded, chosen_by))
            return lambda parts: _done(Task(begin, self.device), parts, options, say)

        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calibration": ()}  # it travels packed


@dataclass(frozen=True)
class _Work:
    parted: Parted
    prompts: Prompts
    batch: int
    asked: ProfileOptions
    recorded: bytes
    chosen_by: bytes


def _done(
    task: Task, parts: list[Part], options: ExecutorOptions, say: Say
) -> Iterator[tuple[Part, Round]]:
    try:
        yield from execute(task, deque(parts), options, say)
    except WorkerLost as error:
        raise WorkerLost(
            f"{error}; the rounds that were kept are there: the same command goes on"
        ) from None


def _begin(work: _Work, device: str) -> Do:
    """In a worker: the model, made ready for probes as long as the process lives."""
    p, asked = work.parted, work.asked
    pipe = load_pipeline(p.folder, device, p.dtype, offload=p.offload)
    calls: Any = (
        trajectories(pipe, work.prompts, p.sampling, work.batch)
        if asked.mode == "trajectory"
        else _unpacked(work.recorded, device)
    )
    given = ProfileWork(
        pipe=pipe, sampling=p.sampling, calibration=_unpacked(work.chosen_by, device)
    )
    schemes = tuple(Scheme.parse(s) for s in asked.schemes)
    ready = ExitStack()
    task = ready.enter_context(
        questioned(model_of(pipe, p.graph.components), p.graph, schemes, calls, asked, given)
    )
    contraction = Contraction(task)
    ready.enter_context(contraction.watching())

    def do(part: Part, _ready: ExitStack = ready) -> Round:
        return measure(task, contraction, part)

    return do


def _packed(calls: Sequence[Call]) -> bytes:
    """Calls as bytes: tensors that several calls share are written once."""
    buffer = io.BytesIO()
    torch.save(list(calls), buffer)
    return buffer.getvalue()


def _unpacked(content: bytes, device: str) -> list[Call]:
    found: list[Call] = torch.load(io.BytesIO(content), map_location=device, weights_only=False)
    return found
