"""MixDQ's published plans: its own integer programs, solved again, give its own plans; one joint
problem in noise power beats them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qsearch.core.scheme import Scheme
from qsearch.decide.problem import Problem
from qsearch.decide.solvers import ilp, lagrangian, local

pytestmark = pytest.mark.reference
BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def reference(published: Path) -> dict[str, Any]:
    """The published files by stem."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in published.glob("*.yaml")}


def problem(loss: dict[str, dict[int, float]], weights: dict[str, float], limit: float) -> Problem:
    """Least sum of losses, layer -> bits -> loss, at no more than `limit` bits in all."""
    return Problem(
        sites=tuple(loss),
        choices=tuple(tuple(Scheme.parse(f"uint{b}-c") for b in row) for row in loss.values()),
        values=tuple(np.array(list(row.values())) for row in loss.values()),
        costs={
            "average_bits": tuple(
                weights[name] * np.array(list(row), float) for name, row in loss.items()
            )
        },
        limits={"average_bits": limit},
    )


@pytest.mark.parametrize(
    ("plan", "group", "objective", "layers"),
    [
        ("plan_weight_4.00", "content", 419.2416, 420),
        ("plan_weight_4.00", "quality", 27085.8866, 374),
        ("plan_weight_5.02", "content", 419.6397, 420),
        ("plan_weight_5.02", "quality", 29300.2032, 374),
    ],
)
def test_its_own_program_solved_exactly_gives_its_own_plan(
    reference: dict[str, Any], plan: str, group: str, objective: float, layers: int
) -> None:
    published, weights = reference[plan], reference["weight_ratio"]
    content = group == "content"
    table = (
        reference["weight_ssim"]
        if content
        else {
            k: v
            for k, v in reference["weight_sqnr_db"].items()
            if k not in reference["weight_ssim"]
        }
    )
    best = (
        1.0 if content else 120.0
    )  # the sums are maximised; a solver minimises what is missing to the best
    loss = {
        name: {b: best - x for b, x in zip(BITS, row, strict=True) if content or b > 2}
        for name, row in table.items()
    }
    limit = sum(weights[name] * published[name] for name in table)

    chosen, said = ilp.solve(problem(loss, weights, limit))

    assert said.status == "optimal"
    assert len(chosen) == layers
    assert sum(table[name][BITS.index(s.bits)] for name, s in chosen.items()) == pytest.approx(
        objective, abs=1e-4
    )
    assert {name: s.bits for name, s in chosen.items()} == {name: published[name] for name in table}


@pytest.mark.parametrize(
    ("plan", "published_scores", "least_decibels", "most_lost"),
    [
        ("plan_weight_4.00", (26.55, 0.7249), 28.76, 0.4521),
        ("plan_weight_5.02", (31.92, 0.3269), 33.59, 0.1853),
    ],
)
def test_one_joint_problem_in_noise_power_beats_the_published_plan_on_both_metrics_at_once(
    reference: dict[str, Any],
    plan: str,
    published_scores: tuple[float, float],
    least_decibels: float,
    most_lost: float,
) -> None:
    sqnr, ssim, weights, published = (
        reference[k] for k in ("weight_sqnr_db", "weight_ssim", "weight_ratio", plan)
    )
    noise = {
        name: {b: 10 ** (-x / 10) for b, x in zip(BITS, row, strict=True)}
        for name, row in sqnr.items()
    }

    def total(bits: dict[str, int]) -> tuple[float, float]:
        """Predicted SQNR of the whole in dB, and SSIM lost over the content layers against 8
        bits.
        """
        return (
            -10 * math.log10(sum(noise[name][b] for name, b in bits.items())),
            sum(ssim[name][2] - ssim[name][BITS.index(bits[name])] for name in ssim),
        )

    chosen, said = ilp.solve(problem(noise, weights, sum(weights[n] * published[n] for n in sqnr)))
    decibels, lost = total({name: s.bits for name, s in chosen.items()})

    assert said.status == "optimal"
    assert total(published) == pytest.approx(published_scores, abs=5e-3)
    assert decibels >= least_decibels
    assert lost <= most_lost


@pytest.mark.parametrize("solver", [lagrangian, local])
def test_heuristics_come_within_a_thousandth_of_the_joint_optimum(
    reference: dict[str, Any], solver: Any
) -> None:
    sqnr, weights, published = (
        reference[k] for k in ("weight_sqnr_db", "weight_ratio", "plan_weight_4.00")
    )
    noise = {
        name: {b: 10 ** (-x / 10) for b, x in zip(BITS, row, strict=True)}
        for name, row in sqnr.items()
    }
    joint = problem(noise, weights, sum(weights[n] * published[n] for n in sqnr))

    _, best = ilp.solve(joint)
    _, said = solver.solve(joint, seconds=5.0)

    assert said.bound <= best.objective * (1 + 1e-9) <= said.objective * (1 + 2e-9)
    assert said.objective <= 1.001 * best.objective
