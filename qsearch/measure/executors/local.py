"""One part after the other in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from ...core.errors import QSearchError
from ..executing import ExecutorOptions, Say, Task, threads_set


def execute(
    task: Task, parts: deque[Any], options: ExecutorOptions, say: Say
) -> Iterator[tuple[Any, Any]]:
    """As `AbstractExecutor.execute`."""
    if (options.workers or 1) > 1:
        raise QSearchError(
            f"the executor local is one worker; given {options.workers}: take the executor pool"
        )
    with threads_set(options.threads):
        do = task.begin(task.device)
    while parts:
        part = parts.popleft()
        with threads_set(options.threads):  # never while the caller's code runs
            result = do(part)
        yield part, result
