"""Ray: actors on any number of machines, each with its own model; Ray places, restarts and pins
them to GPUs.
"""

from __future__ import annotations

import os
import platform
import socket
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ...core.errors import QSearchError
from ..executing import Attempt, Do, ExecutorOptions, Say, Task, WorkerLost, attempt, begun

#: how often Ray starts a worker again that died, and does its part again
_RESTARTS = 3
_LOOK = 2.0  # seconds between looks at a head that may have gone
_GONE = 6  # looks in vain after which it has
_STORE = 256 * 2**20  # bytes of the object store of a Ray that is started here
#: of a Ray of our own: no telemetry, and visible GPUs as they are
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def execute(
    task: Task, parts: deque[Any], options: ExecutorOptions, say: Say
) -> Iterator[tuple[Any, Any]]:
    """As `AbstractExecutor.execute`; workers that can't begin are left out with a word."""
    ray = _ray()
    with _connected(ray, options):
        yield from _Crew(ray, task, options, say).work(parts)


class _Crew:
    """The actors of one task: who is beginning, who works at what."""

    def __init__(self, ray: Any, task: Task, options: ExecutorOptions, say: Say) -> None:
        self.ray, self.task, self.options, self.say = ray, task, options, say
        self.beginning: dict[Any, Any] = {}  # reference -> actor
        self.running: dict[Any, tuple[Any, Any]] = {}  # reference -> (actor, part)
        self.idle: deque[Any] = deque()
        self.actors: list[Any] = []
        self.why: list[str] = []
        self.in_vain = 0

    def work(self, parts: deque[Any]) -> Iterator[tuple[Any, Any]]:
        """(part, result) as they are finished."""
        self._hire(len(parts))
        try:
            while parts or self.running:
                while parts and self.idle:
                    actor, part = self.idle.popleft(), parts.popleft()
                    self.running[actor.do.remote(self.shared, part)] = actor, part
                if not self.beginning and not self.running:
                    raise WorkerLost(f"no worker is left: {self.why[0]}")
                waiting = [*self.beginning, *self.running]
                done, _ = self.ray.wait(waiting, num_returns=1, timeout=_LOOK)
                if not done:
                    self._look_at_head()
                for reference in done:
                    self.in_vain = 0
                    if reference in self.beginning:
                        self._begun(reference)
                    else:
                        yield from self._worked(reference, parts)
        finally:
            for actor in self.actors:
                with suppress(Exception):
                    self.ray.kill(actor)

    def _hire(self, parts: int) -> None:
        cuda = self.task.device.startswith("cuda")
        kind = self.ray.remote(_Worker).options(
            num_cpus=self.options.threads,
            num_gpus=1 if cuda else 0,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
            scheduling_strategy="SPREAD",
        )
        # In the store once, however many workers; in a list, so that a worker takes it out once.
        self.shared = [self.ray.put(self.task)]
        for _ in range(self._count(parts, cuda=cuda)):
            actor = kind.remote(self.options.threads)
            self.actors.append(actor)
            self.beginning[actor.ready.remote(self.shared)] = actor

    def _count(self, parts: int, *, cuda: bool) -> int:
        if self.options.workers is not None:
            return min(self.options.workers, parts)
        has = self.ray.cluster_resources()
        found = int(has.get("GPU", 0) if cuda else has.get("CPU", 1) // self.options.threads)
        if found < 1:
            wanted = "GPU" if cuda else f"node with {self.options.threads} cores"
            raise QSearchError(f"Ray's cluster has no {wanted}; give --workers to wait for one")
        return min(found, parts)

    def _begun(self, reference: Any) -> None:
        actor = self.beginning.pop(reference)
        try:
            mistake = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            mistake = f"a worker was lost while it began ({_short(error)})"
        if mistake is None:
            self.idle.append(actor)
            return
        self._leave_out(actor, mistake)

    def _leave_out(self, actor: Any, mistake: str) -> None:
        self.why.append(mistake)
        self.say(f"a worker is left out: {mistake}")
        with suppress(Exception):
            self.ray.kill(actor)

    def _worked(self, reference: Any, parts: deque[Any]) -> Iterator[tuple[Any, Any]]:
        actor, part = self.running.pop(reference)
        try:
            found: Attempt | str = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except self.ray.exceptions.RayError as error:
            parts.appendleft(part)  # for another worker
            self.why.append(f"a worker was lost ({_short(error)})")
            self.say(self.why[-1])
            return
        if isinstance(found, str):  # started again where it can't begin
            parts.appendleft(part)
            self._leave_out(actor, found)
            return
        self.idle.append(actor)
        yield part, found.result()

    def _look_at_head(self) -> None:
        address = self.ray.get_runtime_context().gcs_address
        self.in_vain = 0 if _answers(address) else self.in_vain + 1
        if self.in_vain >= _GONE:
            raise WorkerLost(f"Ray's head at {address} has gone")


class _Worker:
    """What an actor is: it begins once, also after it was started again, then does part after
    part.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._do: Do | None = None

    def ready(self, shared: list[Any]) -> str | None:
        """None, or why it can't begin."""
        if self._do is not None:
            return None
        import ray

        task: Task = ray.get(shared[0])
        device = "cuda" if task.device.startswith("cuda") else task.device
        own = attempt(lambda: begun(task, device, self._threads))
        self._do = own.value
        return None if own.mistake is None else f"{platform.node()}: {own.mistake}"

    def do(self, shared: list[Any], part: Any) -> Attempt | str:
        """What came of one part, or why this worker can't begin."""
        mistake, do = self.ready(shared), self._do
        if mistake is not None or do is None:
            return str(mistake)
        return attempt(lambda: do(part))


def _ray() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own use of what will be removed
            import ray
    except ImportError as error:
        raise QSearchError(
            f"the executor ray needs Ray ({error}); `pip install ray`, or take the executor pool"
        ) from None
    return ray


@contextmanager
def _connected(ray: Any, options: ExecutorOptions) -> Iterator[None]:
    """Ray's client: the one that is here already, else that of a head, or of a Ray of our own."""
    own: dict[str, Any] = {}
    address = options.address
    named = address is not None and ":" in address and "://" not in address
    if named and not _answers(str(address)):
        raise QSearchError(f"no head of Ray answers at {address}; {_START}")
    if ray.is_initialized():
        yield
        return
    if address is None:
        cores = max(os.cpu_count() or 1, (options.workers or 1) * options.threads)
        own = {"num_cpus": cores, "object_store_memory": _STORE, "include_dashboard": False}
        address = "local"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, logging_level="error", **own)
    except Exception as error:  # Ray raises whatever it finds, other versions of itself included
        remedy = _TOKEN if "AuthToken" in f"{error.__cause__}" else _START
        where = options.address or "this machine"
        raise QSearchError(f"Ray can't be reached at {where} ({_short(error)}); {remedy}") from None
    try:
        yield
    finally:
        with suppress(Exception):
            ray.shutdown()


_TOKEN = "its head asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as there"
_START = "start one with `ray start --head`, and give --address auto or HOST:PORT"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=_LOOK):
                return True
        except (OSError, ValueError, OverflowError):
            if time.monotonic() - began > 1.0:
                return False
            time.sleep(0.2)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
