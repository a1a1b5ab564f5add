"""EstimationTask and PartialResult: the interface of estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..core.cost import can_have
from ..core.graph import OpGraph
from ..core.plan import ONE_RANGE
from ..core.scheme import Scheme
from ..core.sites import fits_site
from ..core.steps import StepRanges
from ..core.table import SensitivityTable
from .observation import AbstractObservation
from .quantized_weights import QuantizedWeights

#: a round of probes: (its first probe, step bin, part of the bin)
Part = tuple[int, int, int]
#: what a round found: metric -> (shares [choices, sampler steps, probes], scale of the part)
Round = dict[str, tuple[NDArray[np.float32], float]]


@dataclass(frozen=True)
class EstimationTask:
    """The error of each scheme at each quantizable layer (and, of those that may be there, at each
    of `sites`), by each metric, over the observations.

    `attentions`: choices for those of `sites` that are whole attentions, where they fit; what they
    carry from step to step begins anew in each of `ranges`.

    `calibrated`: holds the calibration that some of the schemes need; with `shared` it also keeps
    the weights that were made, for whoever asks next. `elsewhere`: does rounds of probes in other
    processes, in any order; None = they are done here.
    """

    model: nn.Module
    graph: OpGraph
    schemes: tuple[Scheme, ...]
    observations: tuple[AbstractObservation, ...]
    metrics: tuple[str, ...]
    probes: int
    seed: int = 0
    calibrated: QuantizedWeights | None = None
    sites: tuple[str, ...] = ()
    attentions: tuple[Scheme, ...] = ()
    ranges: StepRanges = ONE_RANGE
    shared: bool = False
    elsewhere: Callable[[list[Part]], Iterator[tuple[Part, Round]]] | None = None

    @cached_property
    def choices(self) -> dict[str, tuple[Scheme, ...]]:
        """Layer or site -> its schemes."""
        offered = (*self.schemes, *self.attentions)
        found = {
            x.name: tuple(s for s in self.schemes if can_have(x, s)) for x in self.graph.quantizable
        }
        for site in self.sites:
            found[site] = tuple(s for s in offered if fits_site(self.graph, site, s))
        return {name: schemes for name, schemes in found.items() if schemes}

    @property
    def count(self) -> int:
        """How many choices there are."""
        return sum(len(schemes) for schemes in self.choices.values())

    def weights(self) -> QuantizedWeights:
        """A new cache of quantized weights (one a layer keeps memory low, since layers are visited
        one after the other), or the shared one.
        """
        if self.shared and self.calibrated is not None:
            return self.calibrated
        return (
            QuantizedWeights(self.model, self.graph)
            if self.calibrated is None
            else self.calibrated.fresh()
        )

    @cached_property
    def bins(self) -> dict[int, list[AbstractObservation]]:
        """Step bin -> its parts."""
        found: dict[int, list[AbstractObservation]] = {}
        for observation in self.observations:
            found.setdefault(observation.bin, []).append(observation)
        return dict(sorted(found.items()))

    def floor(self, site: str, metric: str, bin: int) -> float:
        """The floor of a site's estimates: 0 where its component does not run in the bin, and makes
        no error at all.
        """
        component = self.graph.component(site)
        if component and not any(component in o.components for o in self.bins[bin]):
            return 0.0
        return self.floors[metric, bin]

    @cached_property
    def floors(self) -> dict[tuple[str, int], float]:
        """Metric and step bin -> what the bin's parts read, on average, when nothing was
        changed.
        """
        found: dict[tuple[str, int], float] = {}
        for b, parts in self.bins.items():
            read = [part.floor() for part in parts]
            found |= {
                (metric, b): sum(r[metric] for r in read) / len(read) for metric in self.metrics
            }
        return found


@dataclass(frozen=True)
class PartialResult:
    """How far an estimator is: `done` of `total` items, and the table so far (made when asked
    for).
    """

    done: int
    total: int
    table: Callable[[], SensitivityTable]


class AbstractEstimator(Protocol):
    """What a module in `estimators/` provides."""

    #: whether it looks at observations at all
    needs_calls: bool

    def plan(self, task: EstimationTask) -> str:
        """One line before the work starts: denoiser passes (a backward counts two) and memory
        beside the model.
        """
        ...

    def estimate(
        self, task: EstimationTask, earlier: SensitivityTable | None
    ) -> Iterator[PartialResult]:
        """Results as the work goes on; the last one is whole. `earlier`: what a killed call with
        the same question left, which is not done again.
        """
        ...
