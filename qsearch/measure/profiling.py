"""profile(model, graph, schemes, calls) -> SensitivityTable: what every choice at every layer costs, resumable.

Rows are kept in a partial file beside the table while the work goes on, so that a killed run continues where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core import plugins
from ..core.errors import ArtifactError, QSearchError
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .pipelines import Call

_SAVE_SECONDS = 10.0


def profile(
    model: nn.Module,
    graph: OpGraph,
    schemes: Sequence[Scheme | str],
    calls: Sequence[Call],
    *,
    estimator: str = "sweep",
    seed: int = 0,
    partial: Path | None = None,
    key: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> SensitivityTable:
    """Sensitivity of each quantizable layer to each scheme at each recorded call (one call a step bin).

    `partial`: file for unfinished work; rows in it with the same `key` are not measured again. `progress(done, total)` is called as it goes.
    """
    choices = [Scheme.parse(s) for s in schemes]
    if not choices or not calls:
        raise QSearchError("profiling needs at least one scheme and one recorded call")
    rows = _resume(partial, graph, key)
    done = frozenset((str(r["site"]), str(r["scheme"])) for r in rows)
    total, saved = len(graph.quantizable) * len(choices), time.monotonic()
    for count, found in enumerate(plugins.load("estimators", estimator).estimate(model, graph, choices, calls, done), start=len(done) + 1):
        rows += [r | {"estimator": estimator, "seed": seed} for r in found]
        if progress is not None:
            progress(count, total)
        if partial is not None and time.monotonic() - saved > _SAVE_SECONDS:
            SensitivityTable.from_rows(graph.id, rows).save(partial, key=key, seed=seed)
            saved = time.monotonic()
    return SensitivityTable.from_rows(graph.id, rows)


def _resume(partial: Path | None, graph: OpGraph, key: str) -> list[dict[str, Any]]:
    if partial is None or not partial.exists():
        return []
    try:
        table = SensitivityTable.load(partial, graph.id)
    except ArtifactError:
        return []
    if table.header is None or table.header.key != key:
        return []
    return [{str(k): v for k, v in row.items()} for row in table.frame.to_dict("records")]
