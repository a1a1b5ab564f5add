"""Unfinished: what a verb was asked by options, kept until it has finished, so that the same
command goes on without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..core.artifacts import write_text

NAME = "unfinished.yaml"


def of(folder: Path, verb: str) -> dict[str, Any]:
    """Key of the config -> value that the verb was asked for and has not finished; nothing where it
    has.
    """
    found = _read(folder).get(verb)
    return dict(found) if isinstance(found, dict) else {}


def remember(folder: Path, verb: str, asked: Mapping[str, Any]) -> None:
    """Keep what a verb is asked."""
    _write(folder, {**_read(folder), verb: dict(asked)})


def forget(folder: Path, verb: str) -> None:
    """The verb has finished, or was refused."""
    held = _read(folder)
    if held.pop(verb, None) is not None:
        _write(folder, held)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(folder: Path, held: Mapping[str, Any]) -> None:
    if held:
        write_text(folder / NAME, yaml.safe_dump(dict(held), sort_keys=False))
        return
    with suppress(OSError):
        (folder / NAME).unlink(missing_ok=True)
