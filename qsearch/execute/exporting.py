"""What an exporter provides, and what it is given: a plan, its graph, and where the weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..core.graph import LayerSpec, OpGraph
from ..core.plan import BitPlan
from ..core.scheme import Scheme


@dataclass(frozen=True)
class Export:
    """A plan on its way out. `source`: the diffusers folder of the pipeline that it was made for; `component`: the denoiser's folder in it."""

    plan: BitPlan
    graph: OpGraph
    source: Path
    component: str = "transformer"


class AbstractExporter(Protocol):
    """What a module in `exporters/` provides. Its contract is `qsearch.testing.ExporterContract`."""

    #: pip's names of the packages without which `write` can't work
    needs: tuple[str, ...]
    #: whether the files hold weights (else only a configuration that the tool quantizes by)
    writes_weights: bool

    def nearest(self, scheme: Scheme, layer: LayerSpec) -> Scheme:
        """The scheme that the tool carries out for this layer: `scheme` itself where it has it, else the nearest it has (`keep` at last)."""
        ...

    def write(self, job: Export, folder: Path) -> list[Path]:
        """Write what the tool loads into an empty `folder`; every scheme of the plan is one that `nearest` leaves alone. Returns the files."""
        ...

    def read(self, folder: Path, graph: OpGraph) -> dict[str, Scheme]:
        """layer -> scheme as the files say. Raises `QSearchError` that names the first layer which the graph lacks, or the files."""
        ...
