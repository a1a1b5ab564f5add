"""Every plug-in passes the contract of its kind, and each contract rejects a plug-in that is wrong on purpose."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qsearch.core import plugins
from qsearch.core.plan import Solver
from qsearch.core.scheme import Scheme
from qsearch.decide.problem import Choice, Problem
from qsearch.decide.solvers import greedy, ilp
from qsearch.measure.quantizers import minmax
from qsearch.testing import MetricContract, QuantizerContract, SolverContract


@pytest.fixture(params=plugins.names("quantizers"))
def quantizer(request: pytest.FixtureRequest) -> QuantizerContract:
    return type("Contract", (QuantizerContract,), {"plugin": request.param})()


@pytest.mark.parametrize("test", [n for n in dir(QuantizerContract) if n.startswith("test_")])
def test_every_quantizer_keeps_its_contract(quantizer: QuantizerContract, test: str) -> None:
    getattr(quantizer, test)()


@pytest.mark.parametrize("name", plugins.names("solvers"))
@pytest.mark.parametrize("test", [n for n in dir(SolverContract) if n.startswith("test_")])
def test_every_solver_keeps_its_contract(name: str, test: str) -> None:
    searching = {"problems": 6} if name in ("tpe", "nsga2") else {}  # Optuna takes half a second a problem
    getattr(type("Contract", (SolverContract,), {"plugin": name, **searching})(), test)()


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_every_metric_keeps_its_contract(name: str) -> None:
    type("Contract", (MetricContract,), {"plugin": name})().test_more_noise_scores_worse()


def broken(**functions: object) -> types.ModuleType:
    module = types.ModuleType("broken")
    module.__dict__.update(functions)
    return module


def off_by_one_step(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = minmax.quantize(groups, scheme)
    return codes, scale, zero + 1


def no_guard_for_constant_rows(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**scheme.bits - 1)
    return ((groups - low) / scale).round().nan_to_num().to(torch.uint8), scale, -low / scale


def clips_an_eight_bit_grid(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    # What MixDQ's released sensitivity scripts do: the scale of 8 bits with the levels of fewer.
    _, scale, _ = minmax.quantize(groups, Scheme(f"uint{8}", scheme.group))
    half = 2 ** (scheme.bits - 1)
    return (groups / scale + half).round().clamp(0, 2 * half - 1).to(torch.uint8), scale, torch.full_like(scale, half)


@pytest.mark.parametrize(
    ("quantize", "test"),
    [
        (off_by_one_step, "test_the_round_trip_stays_within_half_a_step"),
        (no_guard_for_constant_rows, "test_degenerate_rows_survive"),
        (clips_an_eight_bit_grid, "test_the_round_trip_stays_within_half_a_step"),
    ],
)
def test_a_wrong_quantizer_is_rejected(quantize: object, test: str) -> None:
    contract = type("Contract", (QuantizerContract,), {"plugin": broken(supports=minmax.supports, quantize=quantize)})()

    with pytest.raises(AssertionError):
        getattr(contract, test)()


def ignores_the_budget(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    return {s: problem.choices[i][-1] for i, s in enumerate(problem.sites)}, Solver("broken", "optimal")


def calls_a_heuristic_optimal(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    chosen, _ = greedy.solve(problem, seconds=seconds)
    return chosen, Solver("broken", "optimal", 0.0, objective=problem.total(chosen))


def counts_no_formats(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    return ilp.solve(replace(problem, formats=None), seconds=seconds)


def proves_too_much(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    chosen, said = ilp.solve(problem, seconds=seconds)
    return chosen, replace(said, bound=1.01 * problem.total(chosen))


def leaves_interactions_out(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    return ilp.solve(replace(problem, scores=None), seconds=seconds)


@pytest.mark.parametrize(
    ("solve", "exact", "test"),
    [
        (ignores_the_budget, False, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (ignores_the_budget, False, "test_an_infeasible_problem_is_called_so"),
        (calls_a_heuristic_optimal, True, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (counts_no_formats, False, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (proves_too_much, True, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (leaves_interactions_out, True, "test_interactions_are_minimised_or_refused"),
    ],
)
def test_a_wrong_solver_is_rejected(solve: object, exact: bool, test: str) -> None:
    contract = type("Contract", (SolverContract,), {"plugin": broken(solve=solve, exact=exact, quadratic=False)})()

    with pytest.raises(AssertionError):
        getattr(contract, test)()


def test_a_metric_that_ignores_its_input_is_rejected() -> None:
    contract = type("Contract", (MetricContract,), {"plugin": broken(measure=lambda outcome, reference: 1.0, higher_is_better=True)})()

    with pytest.raises(AssertionError):
        contract.test_more_noise_scores_worse()
