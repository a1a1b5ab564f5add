"""Data: what a surrogate learns from and predicts for, and what it must be able to do with it: the interface of all surrogates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from .features import Array
from .nodes import Nodes


@dataclass(frozen=True)
class Data:
    """Plans as columns `values` [plans, columns], and, for predictors that want the graph, as `nodes`: a graph for each plan.

    `prior`: index of the column in which a table predicts the whole plan, in dB of noise power; None without a table.
    """

    columns: tuple[str, ...]
    values: Array
    prior: int | None = None
    nodes: tuple[Nodes, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, which: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> Data:
        """Some of the plans."""
        picked = [int(i) for i in which]
        return Data(self.columns, self.values[picked], self.prior, tuple(self.nodes[i] for i in picked) if self.nodes else ())


class AbstractModel(Protocol):
    """A fitted surrogate. Its module says `needs_graph`, and has `fit(data, target, seed)` and `load(folder)`."""

    def predict(self, data: Data) -> Array:
        """The metric of each plan [plans]."""
        ...

    def shares(self, data: Data) -> tuple[Array, float]:
        """(what each column adds to each prediction [plans, columns], the base value): they add up to `predict` to rounding of fp64."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model into a folder, as text or safetensors, never as a pickle."""
        ...
