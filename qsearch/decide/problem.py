"""Problem: sites x choices with values, costs and limits; all a solver sees.

The value of a choice is its noise power on the output: errors of independent choices add as powers, not as decibels (a sum of dB
mostly buys layers that are cheap, see the reference plans of MixDQ). Built from a table and a graph, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InfeasibleBudget, QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Budget, cost
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Choose one of `choices[i]` for each of `sites`: least sum of `values`, every sum of `costs` within its limit.

    `values[i]`, `costs[name][i]`: one number a choice. `fixed`: what the layers that are no sites cost, already taken off the limits.
    """

    sites: tuple[str, ...]
    choices: tuple[tuple[Scheme, ...], ...]
    values: tuple[Vector, ...]
    costs: dict[str, tuple[Vector, ...]]
    limits: dict[str, float]

    def total(self, chosen: Mapping[str, Scheme]) -> float:
        """Sum of the values of a full assignment."""
        return float(sum(self.values[i][self.choices[i].index(chosen[s])] for i, s in enumerate(self.sites)))


def make_problem(graph: OpGraph, table: SensitivityTable, budget: Budget, *, metric: str = "noise", schemes: Sequence[Scheme | str] | None = None) -> Problem:
    """Problem over the quantizable layers: the table's schemes (or those in `schemes`), and `keep`, which adds no noise.

    Raises `QSearchError` for a layer without values and `InfeasibleBudget`, with the best reachable, for a budget below the cheapest choices.
    """
    table.check(graph)
    measured = table.values(metric)
    allowed = None if schemes is None else {str(Scheme.parse(s)) for s in schemes} | {str(KEEP)}
    known = {s for found in measured.values() for s in found} | {str(KEEP)}
    for name in sorted((allowed or known) - known):
        raise QSearchError(f"the table has no scheme {name}{nearest(name, known)}")
    sites, choices, values = [], [], []
    for layer in graph.quantizable:
        if layer.name not in measured:
            raise QSearchError(f"the table has no values for {layer.name}; profile it, or keep it by making it not quantizable")
        found = {str(KEEP): 0.0} | {s: v for s, v in measured[layer.name].items() if allowed is None or s in allowed}
        sites.append(layer.name)
        choices.append(tuple(Scheme.parse(s) for s in found))
        values.append(np.array(list(found.values())))
    fixed = {layer.name: KEEP for layer in graph if not layer.quantizable}
    rest = {name: price(graph, name, fixed) for name in budget.limits}
    scale = _scale(graph)
    costs = {
        name: tuple(np.array([price(graph, name, {site: c}) for c in options]) * scale[name] for site, options in zip(sites, choices, strict=True))
        for name in budget.limits
    }
    limits = {name: limit - rest[name] * scale[name] for name, limit in budget.limits.items()}
    for name in limits:
        _check(budget, name, float(sum(c.min() for c in costs[name])) + rest[name] * scale[name])
    return Problem(tuple(sites), tuple(choices), tuple(values), costs, limits)


def check_budget(graph: OpGraph, budget: Budget, schemes: Sequence[Scheme | str]) -> None:
    """Raise `InfeasibleBudget`, with the best reachable, where `schemes` and `keep` can't keep a limit; needs no table, so it can be asked first."""
    options = [*map(Scheme.parse, schemes), KEEP]
    for name in budget.limits:
        least = (min(price(graph, name, {x.name: s}) for s in (options if x.quantizable else [KEEP])) for x in graph)
        _check(budget, name, sum(least) * _scale(graph)[name])


def _scale(graph: OpGraph) -> dict[str, float]:
    return {"average_bits": 1 / graph.weights, "bytes": 1 / 8, "bit_operations": 1.0}


def _check(budget: Budget, name: str, best: float) -> None:
    if best > budget.limits[name] * (1 + 1e-12):  # rounding of the sum, as `Budget.excess` allows
        # Rounded up: who asks for the number that is printed gets it.
        shown = f"{math.ceil(best * 1e4) / 1e4:.4f}" if name == "average_bits" else f"{math.ceil(best)}"
        raise InfeasibleBudget(f"no plan reaches {name} {budget.limits[name]:g}; the least with these choices is {shown}")


def price(graph: OpGraph, name: str, layers: Mapping[str, Scheme]) -> float:
    """The part of a cost that `layers` make, in the unit before scaling (bits, or bit-operations)."""
    part = OpGraph(graph.model, tuple(graph.layer(n) for n in layers)) if layers else None
    if part is None:
        return 0.0
    priced = cost(part, layers)
    return float(priced.bit_operations if name == "bit_operations" else priced.bits)
