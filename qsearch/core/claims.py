"""Claims: which plans a worker is measuring right now, so that no two workers measure the same one.

A claim is a running trial of a study of its own beside the trials, in any of Optuna's storages. All
of them number the trials of a study in the order in which they are written, so of several claims on
one plan the first one holds. Whoever holds it beats: a number that grows as long as the worker
lives. A claim whose number stands still for `lapse` seconds, by the clock of whoever looks, lapses;
so does at once one of a process of this machine that has ended.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .storage import open_study, patiently

if TYPE_CHECKING:
    import optuna

STUDY = "qsearch.claims/1"
#: seconds without a beat after which a claim lapses
LAPSE = 60.0
_BEATS = 4  # within that time


class Claims:
    """The claims beside the trials of one storage.

    Args:
        storage: where the trials lie.
        lapse: seconds without a beat after which another worker's claim lapses.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, lapse: float = LAPSE) -> None:
        self.lapse, self._storage = lapse, storage
        self._study = patiently(lambda _: open_study(storage, STUDY))
        #: token of another worker's claim -> its beat, and when we first saw that beat
        self._seen: dict[str, tuple[int, float]] = {}

    @contextmanager
    def held(self, wanted: str) -> Iterator[bool]:
        """Hold the claim on what `wanted` names; gives whether we have it. It ends with the
        block.
        """
        token = uuid.uuid4().hex
        patiently(lambda attempt: self._write(token, wanted, attempt))
        mine = patiently(lambda _: self._first(token, wanted))
        if mine is None:
            yield False
            return
        stop = threading.Event()
        beats = threading.Thread(target=self._beat, args=(mine, stop), daemon=True)
        beats.start()
        try:
            yield True
        finally:
            stop.set()
            beats.join()
            patiently(lambda _: self._end(mine))

    def _write(self, token: str, wanted: str, attempt: int) -> None:
        import optuna

        if attempt and any(t.user_attrs.get("token") == token for t in self._running()):
            return
        attributes = {"token": token, "wanted": wanted, "by": _here(), "beat": 0}
        running = optuna.trial.TrialState.RUNNING
        self._study.add_trial(optuna.trial.create_trial(state=running, user_attrs=attributes))

    def _first(self, token: str, wanted: str) -> optuna.trial.FrozenTrial | None:
        """Our claim, where no earlier one on the same thing is alive; else it is taken back."""
        rivals = sorted(
            (t for t in self._running() if t.user_attrs.get("wanted") == wanted),
            key=lambda t: t.number,
        )
        mine = next((t for t in rivals if t.user_attrs["token"] == token), None)
        if mine is None:  # another worker took this one for dead
            return None
        for rival in rivals:
            if rival.number == mine.number:
                return mine
            if self._alive(rival):
                self._end(mine)
                return None
            self._end(rival)
        return mine

    def _alive(self, claim: optuna.trial.FrozenTrial) -> bool:
        token, beat = claim.user_attrs["token"], claim.user_attrs["beat"]
        if _ended(claim.user_attrs["by"]):
            return False
        now = time.monotonic()
        known, since = self._seen.get(token, (None, now))
        if known != beat:
            since = now
        self._seen[token] = (beat, since)
        return now - since < self.lapse

    def _running(self) -> list[optuna.trial.FrozenTrial]:
        import optuna

        return self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))

    def _beat(self, claim: optuna.trial.FrozenTrial, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(self.lapse / _BEATS):
            count += 1
            with suppress(Exception):  # the database is away: the next beat may reach it
                self._storage.set_trial_user_attr(claim._trial_id, "beat", count)

    def _end(self, claim: optuna.trial.FrozenTrial) -> None:
        import optuna

        over = optuna.trial.TrialState.FAIL
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # lapsed, or an earlier attempt
            self._storage.set_trial_state_values(claim._trial_id, over)


def _here() -> dict[str, Any]:
    """This process: its machine, id, and when it began, by which a later process of that id
    differs.
    """
    return {"machine": _machine(), "process": os.getpid(), "began": _began(os.getpid())}


def _ended(by: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; of others nobody can tell."""
    if by["machine"] != _machine() or by["began"] == "":
        return False
    return bool(_began(by["process"]) != by["began"])


def _machine() -> str:
    """This machine's name, its boot, and the space of process ids (a container has its own)."""
    found = socket.gethostname()
    with suppress(OSError):
        found += " " + Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        found += " " + os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (it is no path that it names)
    return found


def _began(process: int) -> str:
    """When a process began, in the system's ticks; "" where there is none, or it is unknown."""
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""
