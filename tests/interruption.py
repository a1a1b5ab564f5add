"""Commands on a terminal of their own that are interrupted at random moments: what they say, what
is left of them, and whether the same command then ends as if nothing had been.

Each is a fork of one process that has imported everything (`warm`), so that a moment falls into a
command's own work; the verb `start` is a command while Python imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.ray_cluster import processes

#: seconds in which what a command has started must have ended after it
_AFTER = 5.0
_SHOWN, _HIDDEN = "\x1b[?25h", "\x1b[?25l"
_CTRL_C = b"\x03"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; minus the signal that ended it.
        text: all that stood on its terminal.
        cut: whether it was still at work when it was interrupted.
        seconds: of its work, or from the interruption to the end.
        processes: that it started and that are still there.
        tidy: whether the cursor is shown, and the terminal's settings are as they were.
    """

    code: int
    text: str
    cut: bool
    seconds: float
    processes: int
    tidy: bool


class Shell:
    """Where commands are typed: a folder, and one for temporary files beside it."""

    def __init__(self, place: Path) -> None:
        self.place, self.temporary = place, place / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._context: Any = get_context("forkserver")
        self._context.set_forkserver_preload([f"{__name__.rpartition('.')[0]}.warm"])

    def run(self, *words: str, cold: bool = False) -> Ended:
        """`qsearch WORDS` from beginning to end; `cold`: by a Python of its own."""
        return self._ended(words, None, None, cold=cold)

    def interrupted(
        self, words: Sequence[str], after: float, how: signal.Signals, *, cold: bool = False
    ) -> Ended:
        """The same, with Ctrl-C (SIGINT) or a kill of the command alone after some seconds."""
        return self._ended(words, after, how, cold=cold)

    def _ended(
        self,
        words: Sequence[str],
        after: float | None,
        how: signal.Signals | None,
        *,
        cold: bool,
    ) -> Ended:
        with _terminal() as (ours, theirs, heard):
            before = termios.tcgetattr(theirs)
            began = time.monotonic()
            process = self._started(words, theirs, cold=cold)
            process.join(after)
            cut = process.exitcode is None
            if cut:
                began = time.monotonic()
                if how == signal.SIGINT:
                    os.write(ours, _CTRL_C)
                else:
                    os.kill(process.pid, signal.SIGKILL)
                process.join(300)
            seconds = time.monotonic() - began
            left = _left(process.pid)
            time.sleep(0.1)  # what was written last is heard
            same = termios.tcgetattr(theirs) == before
        text = heard.decode(errors="replace")
        shown = text.rfind(_HIDDEN) <= text.rfind(_SHOWN)
        code = -signal.SIGALRM if process.exitcode is None else process.exitcode
        return Ended(code, text, cut, seconds, left, same and shown)

    def _started(self, words: Sequence[str], terminal: int, *, cold: bool) -> Any:
        if cold:
            return _Cold(words, self.place, self.temporary, terminal)
        place, temporary = str(self.place), str(self.temporary)
        arguments = tuple(words), place, temporary, os.ttyname(terminal)
        process = self._context.Process(target=_command, args=arguments)
        process.start()
        return process

    def leftovers(self, run: Path) -> list[str]:
        """Hidden files in a run and beside it, and what is in the folder for temporary files."""
        found = [*run.rglob(".*"), *run.parent.glob(f".{run.name}*")]
        return [p.name for p in (*found, *self.temporary.iterdir())]


class _Cold:
    """A command as a process of its own, like one of `multiprocessing`."""

    def __init__(self, words: Sequence[str], place: Path, temporary: Path, terminal: int) -> None:
        self._process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "qsearch.cli", *words],
            cwd=place,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "80"},
        )
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def join(self, seconds: float | None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


def _command(words: tuple[str, ...], place: str, temporary: str, terminal: str) -> None:
    """`qsearch WORDS` in this process, which leads a session of its own on `terminal`."""
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)  # the first one that a session opens is its own
    for number in (0, 1, 2):
        os.dup2(opened, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ.update(TMPDIR=temporary, COLUMNS="80")
    os.chdir(place)
    sys.argv = ["qsearch", *words]
    from qsearch.cli import main

    main()


@contextmanager
def _terminal() -> Iterator[tuple[int, int, bytearray]]:
    """Both ends of a terminal, and what is written on it."""
    ours, theirs = pty.openpty()
    heard = bytearray()

    def listen() -> None:
        with suppress(OSError):
            while part := os.read(ours, 4096):
                heard.extend(part)

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    try:
        yield ours, theirs, heard
    finally:
        os.close(theirs)
        listening.join(2)
        os.close(ours)


def _left(session: int) -> int:
    """Processes of a session that do not end within seconds; they are killed then."""
    limit = time.monotonic() + _AFTER
    while there := [p for p in processes() if _session(p) == session]:
        if time.monotonic() > limit:
            for process in there:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return len(there)
        time.sleep(0.2)
    return 0


def _session(process: int) -> int:
    with suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
        state, _, _, session = text.rpartition(")")[2].split()[:4]
        return 0 if state == "Z" else int(session)
    return 0


#: verb -> what is typed, and the files and folders that tell whether it ended well
VERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "start": (("show", "RUN"), ()),
    "extract": (("extract", "my-model", "-o", "RUN"), ("graph.json",)),
    "profile": (("profile", "RUN"), ("sensitivity.parquet",)),
    "allocate": (("allocate", "RUN"), ("plan.json",)),
    "evaluate": (("evaluate", "RUN"), ("results.json", "trials.db")),
    "plans": (("evaluate", "RUN", "--plans", "14", "--workers", "2"), ("trials.db",)),
    "fit": (("fit", "RUN", "--surrogate", "ridge"), ("surrogate",)),
    "explain": (("explain", "RUN"), ("attribution.parquet",)),
    "apply": (("apply", "RUN"), ("model.safetensors",)),
    "export": (
        ("export", "RUN", "--to", "torchao", "--nearest", "--force"),
        ("export-torchao",),
    ),
    "bench": (("bench", "RUN", "--seconds", "0.01"), ()),
    "report": (("report", "RUN"), ()),
    "run": (
        ("run", "RUN"),
        ("graph.json", "sensitivity.parquet", "plan.json", "results.json", "trials.db"),
    ),
}
CONFIG = """
model: {model}
sampling: {{steps: 6}}
profile: {{schemes: ['uint4-c@gptq', uint8-c], probes: 6}}
allocate: {{average_bits: 6}}
evaluate: {{samples: 4}}
fit: {{folds: 3}}
"""
#: commands that may come to their end before they are interrupted, for each moment
_PATIENCE = 4


def prepared(shell: Shell) -> Path:
    """A finished run of a tiny model, which is interrupted in copies."""
    from tests.tiny_pipelines import build

    build("stable_diffusion_xl").save_pretrained(shell.place / "my-model")
    run = shell.place / "ready"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG.format(model=shell.place / "my-model"))
    for words in (("run", "ready"), ("evaluate", "ready", "--plans", "8")):
        ended = shell.run(*words)
        assert ended.code == 0, ended.text
    return run


def moments(shell: Shell, ready: Path, verb: str, count: int, how: signal.Signals) -> Moments:
    """One verb, interrupted at `count` random moments of its length.

    The moments fall one after another into the same folder, so that the verb goes on from where it
    was interrupted; whenever it comes to its end, the next moment begins anew.
    """
    dice, (words, names) = random.Random(f"{verb} {how.name}"), VERBS[verb]
    typed = [verb if word == "RUN" else word for word in words]
    run, cold = _fresh(ready, verb), verb == "start"
    whole = shell.run(*typed, cold=cold)
    assert whole.code == 0, whole.text
    wanted = [content(run / name) for name in names]
    usual = shell.leftovers(run)
    run, cut, ended = _fresh(ready, verb), list[Ended](), list[Ended]()
    same = list[bool]()

    def compare(end: Ended) -> None:
        ended.append(end)
        same.append(end.code == 0 and [content(run / name) for name in names] == wanted)

    while len(cut) < count and len(ended) < _PATIENCE * count:
        length = min([whole.seconds, *(end.seconds for end in ended)])  # other work made it longer
        found = shell.interrupted(typed, dice.uniform(0.0, length), how, cold=cold)
        if found.cut and found.code != 0:  # else it ended before it heard of it
            cut.append(found)
            continue
        compare(found)
        run = _fresh(ready, verb)
    compare(shell.run(*typed))
    left = [name for name in shell.leftovers(run) if name not in usual]
    shutil.rmtree(run, ignore_errors=True)
    return Moments(whole, tuple(cut), tuple(ended), tuple(same), tuple(left))


@dataclass(frozen=True)
class Moments:
    """What came of them.

    Attributes:
        whole: the command that nobody interrupted.
        cut: the commands that were interrupted.
        ended: those that came to their end, the last one at least.
        same: whether each of those left what the whole one left.
        left: names of hidden and temporary files that the whole one does not leave.
    """

    whole: Ended
    cut: tuple[Ended, ...]
    ended: tuple[Ended, ...]
    same: tuple[bool, ...]
    left: tuple[str, ...]


def _fresh(ready: Path, verb: str) -> Path:
    """A copy of the run that lacks what the verb makes."""
    copy = ready.with_name(verb)
    shutil.rmtree(copy, ignore_errors=True)
    if verb == "extract":
        return copy
    shutil.copytree(ready, copy)
    for name in VERBS[verb][1]:
        if (copy / name).is_dir():
            shutil.rmtree(copy / name)
        else:
            (copy / name).unlink(missing_ok=True)
    return copy


def content(path: Path) -> str:
    """Digest of what an artefact says, without headers that name times and commands, and without
    a solver's seconds; "" of none.
    """
    if not path.exists():
        return ""
    if path.suffix == ".parquet":
        import pandas as pd

        return hashlib.sha256(pd.read_parquet(path).to_csv().encode()).hexdigest()
    if path.suffix == ".db":
        return hashlib.sha256(repr(_trials(path)).encode()).hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".json":
            held = json.loads(data)
            if isinstance(held, dict):
                held.pop("header", None)
                if isinstance(solver := held.get("solver"), dict):
                    solver.pop("seconds", None)
            data = json.dumps(held, sort_keys=True).encode()
        sha.update(data)
    return sha.hexdigest()


def _trials(path: Path) -> list[tuple[str, str]]:
    """Names and metrics of all trials."""
    query = (
        "select name.value_json, metrics.value_json from trial_user_attributes name "
        "join trial_user_attributes metrics on name.trial_id = metrics.trial_id "
        "where name.key = 'name' and metrics.key = 'metrics'"
    )
    with closing(sqlite3.connect(path)) as database:
        return sorted(database.execute(query))
