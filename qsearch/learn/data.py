"""Data: what a surrogate learns from and predicts for, and what it must be able to do with it: the
interface of all surrogates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from .features import Array
from .nodes import Nodes

#: how the columns end in which a table predicts the whole plan
PRIORS = ("/plan", "/sum")


@dataclass(frozen=True)
class Data:
    """Plans as columns `values` [plans, columns], and, for predictors that want the graph, as
    `nodes`: a graph for each plan.
    """

    columns: tuple[str, ...]
    values: Array
    nodes: tuple[Nodes, ...] = ()

    @property
    def priors(self) -> tuple[int, ...]:
        """The columns in which a table predicts the whole plan, in dB of noise power; none without
        a table.
        """
        return tuple(i for i, name in enumerate(self.columns) if name.endswith(PRIORS))

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, which: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> Data:
        """Some of the plans."""
        picked = [int(i) for i in which]
        return Data(
            self.columns,
            self.values[picked],
            tuple(self.nodes[i] for i in picked) if self.nodes else (),
        )


class AbstractModel(Protocol):
    """A fitted surrogate. Its module says `needs_graph`, and has `fit(data, target, seed)` and
    `load(folder)`.
    """

    def predict(self, data: Data) -> Array:
        """The metric of each plan [plans]."""
        ...

    def shares(self, data: Data) -> tuple[Array, float]:
        """(what each column adds to each prediction [plans, columns], the base value): they add up
        to `predict` to rounding of fp64.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the model into a folder, as text or safetensors, never as a pickle."""
        ...


@dataclass(frozen=True)
class LinearPrior:
    """What a table's own prediction says of the target: intercept + slope x that column; flat
    without a table. Learners start from it.
    """

    intercept: float
    slope: float = 0.0
    column: int | None = None

    @staticmethod
    def through(data: Data, target: Array) -> LinearPrior:
        """Least squares on the prior that correlates best: with few probes the sum is steadier than
        the sum with interactions.
        """
        moving = [i for i in data.priors if np.ptp(data.values[:, i]) > 0]
        if not moving or np.ptp(target) == 0:
            return LinearPrior(float(target.mean()))
        best = max(moving, key=lambda i: abs(float(np.corrcoef(data.values[:, i], target)[0, 1])))
        slope, intercept = np.polyfit(data.values[:, best], target, 1)
        return LinearPrior(float(intercept), float(slope), best)

    def of(self, data: Data) -> Array:
        """[plans]."""
        rest = np.zeros(len(data)) if self.column is None else data.values[:, self.column]
        return np.asarray(self.intercept + self.slope * rest)
