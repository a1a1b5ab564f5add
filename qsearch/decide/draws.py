"""Draws: plans to measure and to learn from: at random, in a Latin hypercube over roles, or around
the size-error frontier.

Learning needs plans that differ in everything that may matter, from hardly hurt to badly broken.
Layers drawn independently of each other would all have nearly the same size and the same error (the
law of large numbers), so each random plan first draws how coarse it is going to be: that is
Qua2SeDiMo's sampler (its `set_random_config`: p uniform in [0, 1], each layer takes the fewer bits
with probability p, its method uniformly), here for any number of widths. The hypercube gives all
layers of a role one scheme and spreads roles evenly; plans around the frontier are those that one
would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count as numbers
from itertools import islice

import numpy as np

from ..core.cost import can_have
from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan, Solver
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from .allocation import allocate_frontier

#: at most this share of the layers of a frontier's plan is drawn anew
_ASTRAY = 0.3
_BUDGETS = 12
#: draws for each plan that is asked for, at most: a few layers have few plans
_PATIENCE = 20


def draw(
    graph: OpGraph,
    schemes: Sequence[Scheme | str],
    count: int,
    how: str = "random",
    *,
    seed: int = 0,
    table: SensitivityTable | None = None,
) -> dict[str, Plan]:
    """`count` different plans by name, e.g. `random-0-007`: the same for the same seed, and of
    `random` and `frontier` also the first of a longer draw. Fewer where 20 draws for each find no
    more.

    `how`: one of `random`, `latin`, `frontier`; the last needs a `table` that has the schemes.
    """
    if how not in DRAWS:
        raise QSearchError(
            f"plans are drawn in one of the ways {', '.join(DRAWS)}; given "
            f"{how!r}{nearest(how, DRAWS)}"
        )
    if count < 1:
        raise QSearchError(f"at least one plan is drawn; given {count}")
    options = sorted({Scheme.parse(s) for s in schemes}, key=lambda s: (s.bits, str(s)))
    if len(options) < 2:
        raise QSearchError(
            "plans differ where a layer may have two schemes; given "
            f"{', '.join(map(str, options)) or 'none'}"
        )
    if how == "frontier" and table is None:
        raise QSearchError(
            "plans around the frontier need a sensitivity table; make it with `qsearch "
            "profile`, or draw `random` plans"
        )
    drawn = islice(DRAWS[how](graph, options, count, seed, table), _PATIENCE * count)
    different = dict[str, Plan]()
    for chosen in drawn:
        plan = _plan(graph, chosen, how)
        different.setdefault(plan.id, plan)
        if len(different) == count:
            break
    return {f"{how}-{seed}-{i:03d}": plan for i, plan in enumerate(different.values())}


def _plan(graph: OpGraph, chosen: dict[str, Scheme], how: str) -> Plan:
    kept = {layer.name: KEEP for layer in graph if not layer.quantizable}
    possible = {n: s if can_have(graph.layer(n), s) else KEEP for n, s in chosen.items()}
    return Plan.make(graph, possible | kept, solver=Solver(how, "unsolved"))


def _random(
    graph: OpGraph, options: list[Scheme], count: int, seed: int, table: SensitivityTable | None
) -> Iterator[dict[str, Scheme]]:
    widths = sorted({s.bits for s in options})
    of_width = [[s for s in options if s.bits == bits] for bits in widths]
    for i in numbers():
        dice = np.random.default_rng([seed, i])
        # of the next width, at each of the steps from the narrowest: with two widths, Qua2SeDiMo's
        # 1 - p
        chance = dice.uniform()
        rungs = dice.binomial(len(widths) - 1, chance, len(graph.quantizable))
        yield {
            layer.name: of_width[r][dice.integers(len(of_width[r]))]
            for layer, r in zip(graph.quantizable, rungs, strict=True)
        }


def _latin(
    graph: OpGraph, options: list[Scheme], count: int, seed: int, table: SensitivityTable | None
) -> Iterator[dict[str, Scheme]]:
    from scipy.stats import qmc

    roles = sorted({layer.role for layer in graph.quantizable})
    cube = qmc.LatinHypercube(len(roles), rng=np.random.default_rng(seed))
    while True:
        for row in cube.random(count):
            of_role = dict(zip(roles, (options[int(u * len(options))] for u in row), strict=True))
            yield {layer.name: of_role[layer.role] for layer in graph.quantizable}


def _frontier(
    graph: OpGraph, options: list[Scheme], count: int, seed: int, table: SensitivityTable | None
) -> Iterator[dict[str, Scheme]]:
    assert table is not None
    sizes = [Plan.uniform(graph, s).achieved.average_bits for s in options]
    metric = "noise" if "noise" in table.metrics else table.metrics[0]
    plans = allocate_frontier(
        graph,
        table,
        list(np.linspace(min(sizes) * 1.02, max(sizes), _BUDGETS)),
        metric=metric,
        schemes=options,
    )
    for i in numbers():
        dice = np.random.default_rng([seed, i])
        base, share = plans[i % len(plans)], dice.uniform(0, _ASTRAY)
        astray = {
            layer.name: options[dice.integers(len(options))]
            for layer in graph.quantizable
            if dice.uniform() < share
        }
        yield {
            layer.name: astray.get(layer.name, base.single[layer.name])
            for layer in graph.quantizable
        }


DRAWS: dict[
    str,
    Callable[
        [OpGraph, list[Scheme], int, int, SensitivityTable | None], Iterator[dict[str, Scheme]]
    ],
] = {
    "random": _random,
    "latin": _latin,
    "frontier": _frontier,
}
