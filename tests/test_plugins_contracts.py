"""Every plug-in passes the contract of its kind, and each contract rejects a plug-in that is wrong
on purpose.
"""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qsearch.choices.affine import ChannelAffine
from qsearch.choices.codes import Codes, quantize_to_grid
from qsearch.choices.quantizers import minmax
from qsearch.choices.transform import Product
from qsearch.choices.transforms import balance
from qsearch.core import plugins
from qsearch.core.errors import QSearchError
from qsearch.core.plan import Solver
from qsearch.core.scheme import Scheme
from qsearch.decide.problem import Choice, Problem
from qsearch.decide.solvers import greedy, ilp
from qsearch.measure.decoding import needs
from qsearch.measure.predicted_x0 import PredictedX0
from qsearch.testing import (
    ActivationContract,
    FormatContract,
    MetricContract,
    QuantizerContract,
    SolverContract,
    TransformContract,
)


def checks_of(contract: type) -> list[str]:
    return [name for name in dir(contract) if name.startswith("test_")]


@pytest.mark.parametrize("name", plugins.names("quantizers"))
@pytest.mark.parametrize("test", checks_of(QuantizerContract))
def test_every_quantizer_keeps_its_contract(name: str, test: str) -> None:
    getattr(type("Contract", (QuantizerContract,), {"plugin": name})(), test)()


@pytest.mark.parametrize("name", plugins.names("formats"))
@pytest.mark.parametrize("test", checks_of(FormatContract))
def test_every_format_keeps_its_contract(name: str, test: str) -> None:
    getattr(type("Contract", (FormatContract,), {"plugin": name})(), test)()


@pytest.mark.parametrize(
    ("spoilt", "test"),
    [
        ({"words": ("int4",)}, "test_its_words_are_its_own_and_are_read_as_they_are_written"),
        ({"sizes": "x"}, "test_it_declares_how_it_works"),
    ],
)
def test_a_wrong_format_is_rejected(spoilt: dict[str, object], test: str) -> None:
    right = vars(plugins.load("formats", "asymmetric"))
    plugin = broken(**right | spoilt)

    with pytest.raises(AssertionError):
        getattr(type("Contract", (FormatContract,), {"plugin": plugin})(), test)()


@pytest.mark.parametrize("name", plugins.names("activations"))
@pytest.mark.parametrize("test", checks_of(ActivationContract))
def test_every_activation_keeps_its_contract(name: str, test: str) -> None:
    getattr(type("Contract", (ActivationContract,), {"plugin": name})(), test)()


@pytest.mark.parametrize("name", plugins.names("transforms"))
@pytest.mark.parametrize("test", checks_of(TransformContract))
def test_every_transform_keeps_its_contract(name: str, test: str) -> None:
    getattr(type("Contract", (TransformContract,), {"plugin": name})(), test)()


@pytest.mark.parametrize("name", plugins.names("solvers"))
@pytest.mark.parametrize("test", [n for n in dir(SolverContract) if n.startswith("test_")])
def test_every_solver_keeps_its_contract(name: str, test: str) -> None:
    searching = (
        {"problems": 6} if name in ("tpe", "nsga2") else {}
    )  # Optuna takes half a second a problem
    getattr(type("Contract", (SolverContract,), {"plugin": name, **searching})(), test)()


@pytest.mark.parametrize(
    "name",
    [  # those of clips take many seconds
        pytest.param(n, marks=pytest.mark.slow if n in ("flow", "motion") else ())
        for n in plugins.names("metrics")
    ],
)
@pytest.mark.parametrize("test", [n for n in dir(MetricContract) if n.startswith("test_")])
def test_every_metric_keeps_its_contract(name: str, test: str) -> None:
    if needs(plugins.load("metrics", name), "weights") and "noise" in test:
        return  # a network of random weights orders nothing; tests/measure/test_metrics.py has them
    getattr(type("Contract", (MetricContract,), {"plugin": name})(), test)()


def broken(**functions: object) -> types.ModuleType:
    module = types.ModuleType("broken")
    module.__dict__.update(functions)
    return module


def off_by_one_step(groups: Tensor, scheme: Scheme) -> Codes:
    made = minmax.quantize(groups, scheme)
    return replace(made, zero=made.zero + 1)


def no_guard_for_constant_rows(groups: Tensor, scheme: Scheme) -> Codes:
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**scheme.bits - 1)
    return Codes(((groups - low) / scale).round().nan_to_num().to(torch.uint8), scale, -low / scale)


def clips_an_eight_bit_grid(groups: Tensor, scheme: Scheme) -> Codes:
    # What MixDQ's released sensitivity scripts do: the scale of 8 bits with the levels of fewer.
    scale = minmax.quantize(groups, Scheme("uint8", scheme.group)).scale
    half = 2 ** (scheme.bits - 1)
    return Codes(
        (groups / scale + half).round().clamp(0, 2 * half - 1).to(torch.uint8),
        scale,
        torch.full_like(scale, half),
    )


def scales_wider_than_fp16(groups: Tensor, scheme: Scheme) -> Codes:
    made = minmax.quantize(groups, scheme)
    return replace(made, scale=made.scale * (1 + 2.0**-14))


def one_scale_for_all_groups(groups: Tensor, scheme: Scheme) -> Codes:
    made = minmax.quantize(groups.reshape(1, 1, -1), scheme)
    return replace(made, codes=made.codes.reshape(groups.shape))


def one_code_too_many(groups: Tensor, scheme: Scheme) -> Codes:
    made = minmax.quantize(groups, scheme)
    return replace(made, codes=made.codes + (made.codes == 2**scheme.bits - 1).to(torch.uint8))


def coin_flips(groups: Tensor, scheme: Scheme) -> Codes:
    made = minmax.quantize(groups, scheme)
    return replace(made, codes=(made.codes ^ (torch.rand(groups.shape) < 0.5).to(torch.uint8)))


def two_bits_whatever_is_asked(groups: Tensor, scheme: Scheme) -> Codes:
    return minmax.quantize(groups, Scheme("uint2", scheme.group))


@pytest.mark.parametrize(
    ("quantize", "test"),
    [
        (off_by_one_step, "test_every_weight_gets_its_nearest_code"),
        (no_guard_for_constant_rows, "test_degenerate_rows_survive"),
        (clips_an_eight_bit_grid, "test_it_does_no_worse_than_min_max"),
        (scales_wider_than_fp16, "test_codes_fit_the_bits_and_scales_fit_the_granularity"),
        (one_scale_for_all_groups, "test_codes_fit_the_bits_and_scales_fit_the_granularity"),
        (one_code_too_many, "test_codes_fit_the_bits_and_scales_fit_the_granularity"),
        (coin_flips, "test_it_is_deterministic"),
        (two_bits_whatever_is_asked, "test_the_error_falls_when_bits_rise"),
    ],
)
def test_a_wrong_quantizer_is_rejected(quantize: object, test: str) -> None:
    plugin = broken(
        supports=lambda scheme: scheme.family in ("int", "uint"),
        quantize=quantize,
        needs_inputs=False,
        integer_zeros=False,
    )
    contract = type("Contract", (QuantizerContract,), {"plugin": plugin})()

    with pytest.raises(AssertionError):
        getattr(contract, test)()


def test_a_quantizer_that_ignores_the_inputs_it_asked_for_is_rejected() -> None:
    def towards_zero(groups: Tensor, scheme: Scheme, moments: Tensor) -> Codes:
        made = minmax.quantize(groups, scheme)
        return quantize_to_grid(groups * 0.8, made.scale, made.zero, scheme)

    plugin = broken(supports=minmax.supports, quantize=towards_zero, needs_inputs=True)

    with pytest.raises(AssertionError, match="min-max"):
        type(
            "Contract", (QuantizerContract,), {"plugin": plugin}
        )().test_it_does_no_worse_than_min_max()


def half_the_range(x: Tensor, channel: int, inputs: object) -> tuple[Tensor, Tensor]:
    return x.min() / 2, x.max() / 2


def not_a_number_at_zero(x: Tensor, channel: int, inputs: object) -> tuple[Tensor, Tensor]:
    return x.min() / x.abs().max() * x.abs().max(), x.max() / x.abs().max() * x.abs().max()


@pytest.mark.parametrize(
    ("ranges", "test"),
    [
        (half_the_range, "test_nothing_is_clipped_and_steps_are_as_fine_as_the_bits"),
        (half_the_range, "test_floats_keep_small_numbers_and_the_largest"),
        (not_a_number_at_zero, "test_degenerate_inputs_survive"),
    ],
)
def test_a_wrong_activation_is_rejected(ranges: object, test: str) -> None:
    contract = type(
        "Contract", (ActivationContract,), {"plugin": broken(ranges=ranges, needs_inputs=False)}
    )()

    with pytest.raises(AssertionError):
        getattr(contract, test)()


class Forgetful(ChannelAffine):
    """Stores a divisor that is not the one by which it scaled the weight."""

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        assert self.scale is not None
        return {"divisor": self.scale * 2}, product.bias


@pytest.mark.parametrize(
    ("found", "test"),
    [
        (ChannelAffine(scale=torch.zeros(24)), "test_fine_rounding_gives_what_the_layer_gave"),
        (
            ChannelAffine(scale=torch.full((24,), torch.nan)),
            "test_fine_rounding_gives_what_the_layer_gave",
        ),
        (ChannelAffine(scale=torch.full((24,), torch.nan)), "test_it_stores_what_it_declares"),
        (ChannelAffine(scale=torch.ones(1)), "test_it_stores_what_it_declares"),
        (ChannelAffine(offset=torch.zeros(24)), "test_it_stores_what_it_declares"),
        (
            Forgetful(scale=torch.full((24,), 2.0)),
            "test_the_packed_form_computes_what_is_simulated",
        ),
        (
            ChannelAffine(offset=torch.full((24,), 1000.0)),
            "test_coarse_rounding_is_not_made_much_worse",
        ),
        (
            ChannelAffine(scale=torch.logspace(-3, 3, 24)),
            "test_coarse_rounding_is_not_made_much_worse",
        ),
    ],
)
def test_a_wrong_transform_is_rejected(found: ChannelAffine, test: str) -> None:
    plugin = broken(**{**vars(balance), "fit": lambda site: found})
    contract = type("Contract", (TransformContract,), {"plugin": plugin})()

    with pytest.raises((AssertionError, RuntimeError, QSearchError)):
        getattr(contract, test)()


def ignores_the_budget(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    return {s: problem.choices[i][-1] for i, s in enumerate(problem.sites)}, Solver(
        "broken", "optimal"
    )


def calls_a_heuristic_optimal(
    problem: Problem, *, seconds: float
) -> tuple[dict[str, Choice], Solver]:
    chosen, _ = greedy.solve(problem, seconds=seconds)
    return chosen, Solver("broken", "optimal", 0.0, objective=problem.total(chosen))


def counts_no_formats(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    return ilp.solve(replace(problem, formats=None), seconds=seconds)


def proves_too_much(problem: Problem, *, seconds: float) -> tuple[dict[str, Choice], Solver]:
    chosen, said = ilp.solve(problem, seconds=seconds)
    return chosen, replace(said, bound=1.01 * problem.total(chosen))


def leaves_interactions_out(
    problem: Problem, *, seconds: float
) -> tuple[dict[str, Choice], Solver]:
    return ilp.solve(replace(problem, scores=None), seconds=seconds)


@pytest.mark.parametrize(
    ("solve", "exact", "test"),
    [
        (ignores_the_budget, False, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (ignores_the_budget, False, "test_an_infeasible_problem_is_called_so"),
        (
            calls_a_heuristic_optimal,
            True,
            "test_plans_keep_their_limits_and_exact_ones_are_the_best",
        ),
        (counts_no_formats, False, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (proves_too_much, True, "test_plans_keep_their_limits_and_exact_ones_are_the_best"),
        (leaves_interactions_out, True, "test_interactions_are_minimised_or_refused"),
    ],
)
def test_a_wrong_solver_is_rejected(solve: object, exact: bool, test: str) -> None:
    contract = type(
        "Contract", (SolverContract,), {"plugin": broken(solve=solve, exact=exact, quadratic=False)}
    )()

    with pytest.raises(AssertionError):
        getattr(contract, test)()


def test_a_metric_that_ignores_its_input_is_rejected() -> None:
    contract = type(
        "Contract",
        (MetricContract,),
        {
            "plugin": broken(
                measure=lambda outcome, reference: 1.0, higher_is_better=True, needs_video=False
            )
        },
    )()

    with pytest.raises(AssertionError):
        contract.test_more_noise_scores_worse()


def test_a_metric_whose_features_ignore_their_input_is_rejected() -> None:
    def features(made: PredictedX0, reference: PredictedX0) -> tuple[Tensor, Tensor]:
        return made.pictures.flatten(1) * 0, torch.ones(len(made.pictures))

    contract = type(
        "Contract", (MetricContract,), {"plugin": broken(features=features, needs_video=False)}
    )()

    with pytest.raises(AssertionError):
        contract.test_features_lie_farther_apart_the_more_noise_there_is()
