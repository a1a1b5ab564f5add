"""Processes on this machine, each with its own model and, on CUDA, a GPU of its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from ..executing import (
    Attempt,
    Do,
    ExecutorOptions,
    Say,
    Task,
    WorkerLost,
    attempt,
    begun,
    workers_here,
)
from ..workers import follow_parent, starting, stop


def execute(
    task: Task, parts: deque[Any], options: ExecutorOptions, say: Say
) -> Iterator[tuple[Any, Any]]:
    """As `AbstractExecutor.execute`; a killed worker ends the work, what it finished is not
    lost.
    """
    count = workers_here(task, options, len(parts))
    context = get_context("spawn")
    begin = (task, options.threads, context.Value("i", 0), os.getpid())
    pool = ProcessPoolExecutor(count, context, _begin, begin)
    running: dict[Future[Attempt], Any] = {}
    try:
        while parts or running:
            while parts and len(running) < count:
                part = parts.popleft()
                with starting():  # the processes begin with the first parts
                    running[pool.submit(_do, part)] = part
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result().result()
    except BrokenProcessPool:
        raise WorkerLost("a worker was killed (out of memory?)") from None
    except BaseException:
        stop()  # a part takes minutes, and whoever presses Ctrl-C waits for none
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_own: Attempt | None = None  # of a worker process: what it does, or why it can't


def _begin(task: Task, threads: int, taken: Any, parent: int) -> None:
    global _own  # noqa: PLW0603 (a pool hands its processes nothing but the next part)
    follow_parent(parent)
    with taken.get_lock():
        place = taken.value
        taken.value += 1
    _own = attempt(lambda: begun(task, _device(task.device, place), threads))


def _device(device: str, place: int) -> str:
    """One GPU after the other, where the task names none of them."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{place % max(1, torch.cuda.device_count())}"


def _do(part: Any) -> Attempt:
    assert _own is not None, "a worker begins before it works"
    if _own.mistake is not None:
        return _own
    do: Do = _own.value
    return attempt(lambda: do(part))
