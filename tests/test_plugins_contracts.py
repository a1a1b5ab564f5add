"""Every plug-in passes the contract of its kind, and each contract rejects a plug-in that is wrong on purpose."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from qsearch.core import plugins
from qsearch.core.plan import Solver
from qsearch.core.scheme import Scheme
from qsearch.decide.problem import Problem
from qsearch.measure.clean import Clean
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
    getattr(type("Contract", (SolverContract,), {"plugin": name})(), test)()


@pytest.mark.parametrize("name", plugins.names("metrics"))
@pytest.mark.parametrize("test", [n for n in dir(MetricContract) if n.startswith("test_")])
def test_every_metric_keeps_its_contract(name: str, test: str) -> None:
    getattr(type("Contract", (MetricContract,), {"plugin": name})(), test)()


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


def test_a_solver_that_ignores_the_budget_is_rejected() -> None:
    def solve(problem: Problem, *, seconds: float) -> tuple[dict[str, Scheme], Solver]:
        return {s: problem.choices[i][-1] for i, s in enumerate(problem.sites)}, Solver("broken", "optimal")

    contract = type("Contract", (SolverContract,), {"plugin": broken(solve=solve, exact=False)})()

    for test in ("test_plans_keep_their_limits_and_exact_ones_are_the_best", "test_an_infeasible_problem_is_called_so"):
        with pytest.raises(AssertionError):
            getattr(contract, test)()


def test_a_metric_that_ignores_its_input_is_rejected() -> None:
    contract = type("Contract", (MetricContract,), {"plugin": broken(measure=lambda outcome, reference: 1.0, higher_is_better=True)})()

    with pytest.raises(AssertionError):
        contract.test_more_noise_scores_worse()


def test_a_metric_whose_features_ignore_their_input_is_rejected() -> None:
    def features(made: Clean, reference: Clean) -> tuple[Tensor, Tensor]:
        return made.pictures.flatten(1) * 0, torch.ones(len(made.pictures))

    contract = type("Contract", (MetricContract,), {"plugin": broken(features=features)})()

    with pytest.raises(AssertionError):
        contract.test_features_lie_farther_apart_the_more_noise_there_is()
