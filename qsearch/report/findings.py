"""Findings: what a page shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable

if TYPE_CHECKING:
    from ..core.attribution import Attribution
    from .frontier import Frontier


@dataclass(frozen=True)
class Findings:
    """What a page shows of a run.

    `rows`: results, as in results.json. `captions`: what was sampled, a caption for each picture.
    `metric`: what the plan minimised. `frontier`, `attributions`: size against error and what
    explains the plan, each left out where there is none. `target`: the tool that it is for.
    """

    graph: OpGraph
    table: SensitivityTable
    plan: Plan
    rows: Sequence[Mapping[str, Any]]
    captions: Sequence[str]
    metric: str = "noise"
    frontier: Frontier | None = None
    attributions: Sequence[Attribution] = ()
    target: str | None = None

    @property
    def shown(self) -> list[str]:
        """The plans whose pictures are shown: of random ones the first, the others say the same."""
        names = [str(row["plan"]) for row in self.rows]
        random = [name for name in names if name.startswith("random")]
        return [name for name in names if name not in random[1:]]

    @property
    def bits(self) -> dict[str, float]:
        """Plan -> stored bits a weight."""
        return {str(row["plan"]): float(row["average_bits"]) for row in self.rows}
