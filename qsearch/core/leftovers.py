"""Leftovers: names of files that are being written, and what a killed process left of them, which
the next one takes away.

A name says the machine and the process, so that on storage which machines share nobody takes away
what another is writing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path


def beside(path: Path, ending: str = "tmp") -> Path:
    """A hidden neighbour of `path` that is this process's own."""
    return path.with_name(f".{path.name}.{_here()}-{os.getpid()}.{ending}")


def clear(path: Path, *endings: str) -> None:
    """Take away the neighbours of `path` that processes of this machine began and did not live to
    finish.
    """
    start = f".{path.name}.{_here()}-"
    try:
        there = [p for p in path.parent.iterdir() if p.name.startswith(start)]
    except OSError:
        return
    for left in there:
        number, _, ending = left.name.removeprefix(start).partition(".")
        if ending not in endings or not number.isdigit() or _lives(int(number)):
            continue
        with suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _here() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
