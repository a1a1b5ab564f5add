"""The exact solver against brute force: small random problems with every kind of budget and
constraint, and those that can't be solved.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.latency import Latency
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.decide.constraints import Constraints
from qsearch.decide.objectives import Objective

POOL = (
    "uint2-c",
    "uint3-g8",
    "uint4-c",
    "uint4-c+a8",
    "int8-c+a8",
    "e2m1-g16",
    "km3-c",
    "uint8-c",
    "keep+a8",
)
ROLES = (
    "self-attention-q",
    "self-attention-k",
    "self-attention-v",
    "feed-forward-in",
    "feed-forward-out",
)
#: two assignments nearer than that, relative, are equally good
SAME = 1e-9


@dataclass
class Case:
    """One random problem, as the verb takes it and as plain arrays [layers, choices]."""

    graph: OpGraph
    schemes: list[str]
    noise: dict[str, dict[str, float]]
    lost: dict[str, dict[str, float]]
    latency: Latency
    budget: Budget
    constraints: Constraints
    objective: Objective
    kinds: set[str] = field(default_factory=set)


def make(seed: int) -> Case:
    dice = random.Random(seed)
    wide = dice.choice([8, 12, 24])
    shapes = [(dice.choice([4, 6, 10, 40]) * 4, wide) for _ in ROLES]
    layers = tuple(
        LayerSpec(
            f"block.{role.rpartition('-')[2]}",
            role,
            "linear",
            shape,
            16 * math.prod(shape),
            "block",
            inputs=16 * wide,
        )
        for role, shape in zip(ROLES, shapes, strict=True)
    )
    graph = OpGraph(
        "random",
        (*layers, LayerSpec("embed", "embedding", "embedding", (30, 4), 0, quantizable=False)),
    )
    schemes = [*dice.sample(POOL, 3), "keep"]
    noise = {
        x.name: {s: 0.0 if s == "keep" else dice.lognormvariate(-4, 3) for s in schemes}
        for x in layers
    }
    lost = {
        x.name: {s: 0.0 if s == "keep" else dice.uniform(-0.1, 1) for s in schemes} for x in layers
    }
    seconds = {x.name: {s: dice.uniform(1e-3, 2e-3) for s in schemes} for x in layers} | {
        "embed": {"keep": 1e-4}
    }
    case = Case(
        graph,
        schemes,
        noise,
        lost,
        Latency(graph.id, "a clock", seconds, 5e-4),
        Budget(average_bits=16.0),
        Constraints(),
        Objective(),
    )
    whole = {
        name: low + dice.uniform(-0.02, 1) * (high - low)
        for name, (low, high) in ranges(case).items()
        if dice.random() < 0.3
    }
    groups: dict[str, dict[str, float]] = {}
    if dice.random() < 0.3:
        groups["self-attention-*"] = {"average_bits": dice.uniform(3, 12)}
    if not whole and not groups:
        whole["average_bits"] = dice.uniform(3, 12)
    case.budget = Budget(
        **{n: max(1, int(v)) if "bytes" in n else v for n, v in whole.items()}, groups=groups
    )
    case.constraints = Constraints(
        tied=[["block.k", "block.v"]] if dice.random() < 0.3 else [],
        fused=dice.random() < 0.2,
        protected=["feed-forward-out"] if dice.random() < 0.15 else [],
        allowed={"feed-forward-*": dice.sample(schemes, 2)} if dice.random() < 0.3 else {},
        formats=dice.choice([0, 1, 2, 2]) if dice.random() < 0.4 else None,
    )
    case.objective = Objective(
        weights={"noise": 1.0, "lost": 0.01} if dice.random() < 0.2 else {"noise": 1.0},
        at_most={"lost": dice.uniform(0.2, 4)} if dice.random() < 0.3 else {},
        decibels=dice.random() < 0.15,
    )
    rules = case.constraints
    given = {
        "tied": rules.tied,
        "fused": rules.fused,
        "protected": rules.protected,
        "allowed": rules.allowed,
        "formats": rules.formats is not None,
    }
    limited = dict.fromkeys(case.budget.limits, True) | {
        "groups": groups,
        "at_most": case.objective.at_most,
        "decibels": case.objective.decibels,
    }
    case.kinds = {name for name, value in (given | limited).items() if value}
    return case


def arrays(case: Case) -> dict[str, Any]:
    """name of a cost -> [layers, choices], and what the embedding costs, in units of the budget."""
    layers = case.graph.quantizable
    fixed = case.graph.layer("embed")
    schemes = [Scheme.parse(s) for s in case.schemes]
    bits = np.array([[s.stored_bits(x.weight_shape) for s in schemes] for x in layers], float)
    own = 16 * fixed.weights
    weights, attention = case.graph.weights, sum(x.weights for x in layers[:3])
    inside = np.array([[1.0]] * 3 + [[0.0]] * 2)
    return {
        "average_bits": (bits / weights, own / weights),
        "bytes": (bits / 8, own / 8),
        "bit_operations": (
            np.array(
                [[x.macs * s.bits * s.activation_bits for s in schemes] for x in layers], float
            ),
            0.0,
        ),
        "activation_bytes": (
            np.array([[x.inputs * s.activation_bits / 8 for s in schemes] for x in layers], float),
            0.0,
        ),
        "latency": (
            np.array([[case.latency.seconds[x.name][s] for s in case.schemes] for x in layers]),
            6e-4,
        ),
        "attention": (bits / attention * inside, 0.0),
    }


def ranges(case: Case) -> dict[str, tuple[float, float]]:
    found = arrays(case)
    return {
        n: (found[n][0].min(1).sum() + found[n][1], found[n][0].max(1).sum() + found[n][1])
        for n in found
        if n != "attention"
    }


def brute_force(case: Case) -> float | None:
    """Least objective over all assignments that keep everything, None where none does. Knows
    nothing of the code under test.
    """
    names = [x.name for x in case.graph.quantizable]
    picks = np.array(list(itertools.product(range(len(case.schemes)), repeat=len(names))))
    fits = np.ones(len(picks), bool)
    rows, costs = np.arange(len(names)), arrays(case)
    limits = [(costs[n], limit) for n, limit in case.budget.limits.items()]
    limits += [(costs["attention"], x["average_bits"]) for x in case.budget.groups.values()]
    for (cost, own), limit in limits:
        fits &= cost[rows, picks].sum(1) + own <= limit * (1 + 1e-12)
    lost = np.array([[case.lost[n][s] for s in case.schemes] for n in names])
    for limit in case.objective.at_most.values():
        fits &= lost[rows, picks].sum(1) <= limit + 1e-12
    kept = case.schemes.index("keep")
    rules = case.constraints
    ties = [(1, 2)] * bool(rules.tied) + [(0, 1), (1, 2)] * bool(rules.fused)
    for a, b in ties:
        fits &= picks[:, a] == picks[:, b]
    if rules.protected:
        fits &= picks[:, 4] == kept
    for schemes in rules.allowed.values():
        fits &= np.isin(picks[:, 3:], [case.schemes.index(s) for s in schemes]).all(1)
    if rules.formats is not None:
        kinds = [Scheme.parse(s).format for s in case.schemes]
        used = sum(
            ((np.array(kinds)[picks] == kind).any(1) for kind in set(kinds) - {"keep"}),
            np.zeros(len(picks)),
        )
        fits &= used <= rules.formats
    noise = np.array([[case.noise[n][s] for s in case.schemes] for n in names])
    if case.objective.decibels:
        noise, lost = (
            np.maximum(-120, 10 * np.log10(np.maximum(x, 1e-300))) for x in (noise, lost)
        )
    value = noise + case.objective.weights.get("lost", 0.0) * lost
    totals = value[rows, picks].sum(1)[fits]
    return float(totals.min()) if len(totals) else None


def table(case: Case) -> SensitivityTable:
    fixed = {"step": 0, "error": 0.0, "floor": 0.0, "estimator": "sweep", "seed": 0}
    metrics = (("noise", case.noise), ("lost", case.lost))
    rows = [
        {"site": n, "scheme": s, "metric": m, "estimate": v, **fixed}
        for m, found in metrics
        for n, row in found.items()
        for s, v in row.items()
    ]
    return SensitivityTable.from_rows(case.graph.id, rows)


def check(seed: int) -> tuple[set[str], bool]:
    """Compare one problem; what kinds of limits it had, and whether it could be solved."""
    case = make(seed)
    best = brute_force(case)
    ask: dict[str, Any] = {
        "objective": case.objective,
        "constraints": case.constraints,
        "latency": case.latency,
    }
    try:
        plan = allocate(case.graph, table(case), case.budget, **ask)
    except QSearchError as error:
        assert best is None, (
            f"problem {seed} has a plan worth {best}, and was answered with: {error}"
        )
        assert str(error).strip()
        return case.kinds, False
    assert best is not None, f"problem {seed} has no plan, and was answered with {plan.layers}"
    found = plan.solver.objective
    assert found is not None
    assert abs(found - best) <= SAME * max(abs(best), 1e-6), (
        f"problem {seed}: {found} instead of {best}"
    )
    assert plan.solver.status == "optimal", f"problem {seed}: {plan.solver}"
    assert case.budget.excess(plan.achieved) == {}, f"problem {seed}"
    return case.kinds, True


KINDS = {"tied", "fused", "protected", "allowed", "formats", "groups", "at_most", "decibels"}
LIMITS = {"average_bits", "bytes", "bit_operations", "activation_bytes", "latency"}


@pytest.mark.parametrize("part", range(4))
def test_the_exact_solver_finds_the_best_of_all_assignments(part: int) -> None:
    found = [check(seed) for seed in range(40 * part, 40 * (part + 1))]

    assert {kind for kinds, _ in found for kind in kinds} == KINDS | LIMITS
    assert {solved for _, solved in found} == {
        True,
        False,
    }  # some can't be solved, and are called so


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_the_exact_solver_finds_the_best_in_a_thousand_problems(part: int) -> None:
    for seed in range(1000 + 100 * part, 1000 + 100 * (part + 1)):
        check(seed)
