"""allocate_steps(...) -> StepPlan: a scheme for each layer in each bin of steps, where every stored copy of a weight is paid for.

A choice of a site is then a scheme for each bin. Of the many combinations only those are kept that no other one beats in loss and in every
cost at once: with a limit on stored bits alone that is about one for each set of formats.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..core import plugins
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.latency import Latency
from ..core.plan import Budget, parts
from ..core.scheme import KEEP, Scheme
from ..core.stepplan import StepPlan, copies
from ..core.table import SensitivityTable
from .building import limits_of, refuse
from .constraints import Constraints
from .problem import Matrix, Problem

_COMBINATIONS = 4096  # of schemes over the bins, at one layer


def allocate_steps(
    graph: OpGraph,
    table: SensitivityTable,
    budget: Budget,
    *,
    metric: str = "noise",
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    schemes: Sequence[Scheme | str] | None = None,
    solver: str = "ilp",
    seconds: float = 60.0,
) -> StepPlan:
    """Step-wise plan of least mean loss over the table's step bins, within `budget`: stored bits of all copies, mean work and time over the bins.

    Raises what `allocate` raises. `Constraints.formats` is for plans that hold for all steps, and refused here.
    """
    table.check(graph)
    problem = step_problem(
        graph,
        table,
        budget,
        metric=metric,
        constraints=constraints,
        latency=latency,
        schemes=schemes,
    )
    began = time.monotonic()
    chosen, said = plugins.load("solvers", solver).solve(problem, seconds=seconds)
    said = replace(
        said, objective=problem.total(chosen), seconds=round(time.monotonic() - began, 3)
    )
    count = len(next(iter(problem.choices[0])))  # type: ignore[arg-type]  # of this problem every choice is a tuple
    layers = {
        name: choice for name, choice in problem.layers(chosen).items() if isinstance(choice, tuple)
    }
    return StepPlan.make(
        graph,
        layers | {x.name: (KEEP,) * count for x in graph if not x.quantizable},
        budget,
        said,
        latency=latency,
    )


def step_problem(
    graph: OpGraph,
    table: SensitivityTable,
    budget: Budget,
    *,
    metric: str = "noise",
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    schemes: Sequence[Scheme | str] | None = None,
) -> Problem:
    """The problem behind `allocate_steps`: a choice is a tuple of schemes, one a bin."""
    constraints = constraints or Constraints()
    if constraints.formats is not None or budget.groups:
        raise QSearchError(
            "a step-wise plan takes no limit on formats and none for groups of layers; leave them out"
        )
    bins = sorted(int(b) for b in table.frame.loc[table.frame["metric"] == metric, "step"].unique())
    values = [table.values(metric, [b]) for b in bins]
    allowed = None if schemes is None else {Scheme.parse(s) for s in schemes}
    offered = {}
    for layer in graph.quantizable:
        if any(layer.name not in row for row in values):
            raise QSearchError(
                f"the table has no values for {layer.name} in every step bin; profile it"
            )
        offered[layer.name] = (
            KEEP,
            *(
                s
                for s in map(Scheme.parse, values[0][layer.name])
                if s != KEEP and (allowed is None or s in allowed)
            ),
        )
    choices = constraints.choices(graph, offered)
    groups = constraints.groups(graph, choices)
    limits = limits_of(budget)
    sites, options, losses, costs = [], [], [], []
    for names in groups:
        layers = [graph.layer(n) for n in names]
        single = [s for s in choices[names[0]] if all(s in choices[n] for n in names)]
        if len(single) ** len(bins) > _COMBINATIONS:
            raise QSearchError(
                f"{len(single)} schemes in {len(bins)} bins are more combinations than can be looked at; give fewer schemes or bins"
            )
        made = list(itertools.product(single, repeat=len(bins)))
        loss = np.array(
            [
                sum(
                    v[n].get(str(s), 0.0)
                    for n in names
                    for v, s in zip(values, combination, strict=True)
                )
                / len(bins)
                for combination in made
            ]
        )
        paid = np.array(
            [
                [
                    sum(_bill(graph, name, x, combination, latency) for x in layers)
                    for name in limits
                ]
                for combination in made
            ]
        )
        kept = _undominated(np.column_stack([loss, paid]))
        sites.append(names[0])
        options.append(tuple(made[k] for k in kept))
        losses.append(loss[kept])
        costs.append(paid[kept])
    whole = {name: tuple(c[:, i] for c in costs) for i, name in enumerate(limits)}
    fixed = [x for x in graph if not x.quantizable]
    spent = {
        name: sum(_bill(graph, name, x, (KEEP,) * len(bins), latency) for x in fixed)
        for name in limits
    }
    if latency is not None and "latency" in limits:
        spent["latency"] += latency.rest
    for name, rows in whole.items():
        refuse(name, limits[name], spent[name] + float(sum(r.min() for r in rows)))
    left = {name: limits[name] - spent[name] for name in limits}
    return Problem(
        tuple(sites),
        tuple(options),
        tuple(losses),
        whole,
        left,
        spent=spent,
        members=dict(zip(sites, groups, strict=True)),
    )


def _bill(
    graph: OpGraph,
    name: str,
    layer: LayerSpec,
    schemes: tuple[Scheme, ...],
    latency: Latency | None,
) -> float:
    if name in ("average_bits", "bytes"):
        return copies(layer, schemes) / (graph.weights if name == "average_bits" else 8)
    if name == "latency":
        if latency is None:
            raise QSearchError(
                "a budget in latency needs a latency table; give one of a device or of a file"
            )
        return sum(latency.of(layer.name, s) for s in schemes) / len(schemes)
    if name == "bit_operations":
        return sum(parts(layer, s)[1] for s in schemes) / len(schemes)
    raise QSearchError(
        f"a step-wise plan can't be limited in {name}, whose largest bin counts; limit average_bits, bytes, bit_operations or latency"
    )


def _undominated(rows: Matrix) -> list[int]:
    """Indices of the rows that no other row beats: at most as large everywhere, and smaller somewhere; of equal rows the first."""
    order = np.lexsort(rows.T[::-1])
    kept: list[int] = []
    for k in order.tolist():
        if not kept or not (rows[kept] <= rows[k]).all(axis=1).any():
            kept.append(k)
    return sorted(kept)
