"""Plans of schema version 1, and `stepplan.json`, as ranges of steps and choices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ArtifactError, QSearchError
from .steps import StepRanges

#: ranges of steps in a scheme of version 1: `~stepsN`
_STEPS = re.compile(r"~steps([0-9]*)")
#: what a file may hold besides its header
_KNOWN = {"budget", "achieved", "solver", "layers", "sites"}


def converted(path: Path, content: Mapping[str, Any]) -> tuple[StepRanges, dict[str, Any]]:
    """Ranges and choices of a file of schema version 1.

    Raises:
        ArtifactError: the file at `path` holds a key that version 1 had not.
    """
    if unknown := sorted(set(content) - _KNOWN):
        raise ArtifactError(
            f"{path} is a plan of version 1 with the unknown key {unknown[0]!r}; make it again "
            "with `qsearch allocate`"
        )
    given = {**content["layers"], **content.get("sites", {})}
    counts = {split_steps(text)[1] for text in given.values() if isinstance(text, str)} - {1}
    counts |= {len(held) for held in given.values() if not isinstance(held, str)}
    bounds = sorted({i / n for n in counts for i in range(1, n)})
    steps = (
        StepRanges(tuple(bounds)) if len(counts) > 1 else StepRanges.equal(max(counts, default=1))
    )
    choices: dict[str, Any] = {}
    for name, held in given.items():
        if isinstance(held, str):
            plain, count = split_steps(held)
            choices[name] = held if count == 1 else [plain] * len(steps)
        else:
            wide = StepRanges.equal(len(held))
            choices[name] = [held[sum(b <= a for b in wide.bounds)] for a in (0.0, *steps.bounds)]
    return steps, choices


def split_steps(text: str) -> tuple[str, int]:
    """A scheme of an old plan without its `~stepsN`, and N; 1 where it has none."""
    found = _STEPS.findall(text)
    if len(found) > 1 or (found and not (found[0].isdigit() and 2 <= int(found[0]) <= 9)):
        raise QSearchError(
            f"~steps takes a number of ranges from 2 to 9, and stands once; given {text!r}"
        )
    return _STEPS.sub("", text), int(found[0]) if found else 1
