"""Ranges of steps: each call computes with what was chosen for its own range, whatever order calls come in, and the model is left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import Call
from qsearch.measure.profiling import profile
from qsearch.measure.simulation import QuantizedWeights, calibrated_weights, simulate
from qsearch.measure.stepranges import StepRanges, cut, time_of
from tests.models import PlainDenoiser, plain, plain_calls, plain_inputs

TIMES = (900.0, 700.0, 300.0, 100.0)
LAYER = "blocks.0.ff.2"


@pytest.fixture(scope="module")
def case() -> tuple[PlainDenoiser, OpGraph]:
    return plain()


def calls() -> list[Call]:
    """A call at each of `TIMES`; the later ones are louder."""
    out = []
    for i, time in enumerate(TIMES):
        given = plain_inputs(seed=20 + i) | {"timestep": torch.full((3,), time)}
        out.append(Call((), given | {"sample": given["sample"] * (1 + 3 * i)}, i))
    return out


def output(
    model: nn.Module, graph: OpGraph, scheme: str, weights: QuantizedWeights, call: Call
) -> Tensor:
    with torch.no_grad(), simulate(model, {LAYER: Scheme.parse(scheme)}, graph, weights):
        made: Tensor = model(**call.kwargs)
        return made


@pytest.mark.parametrize(
    "scheme", ["uint3-c+a8t~balance", "uint4-c+a4t", "keep+a4t~shift", "uint3-c~balance@gptq"]
)
def test_each_call_computes_with_the_calibration_of_its_own_range(
    case: tuple[PlainDenoiser, OpGraph], scheme: str
) -> None:
    model, graph = case
    ranged = str(replace(Scheme.parse(scheme), ranges=2))
    weights = calibrated_weights(model, graph, {LAYER: [Scheme.parse(ranged)]}, calls())

    for i in (3, 0, 2, 1, 3):  # in any order
        own = QuantizedWeights(
            model, graph, calibrate(model, graph, calls()[:2] if i < 2 else calls()[2:], [LAYER])
        )
        assert torch.equal(
            output(model, graph, ranged, weights, calls()[i]),
            output(model, graph, scheme, own, calls()[i]),
        )
    together = calibrated_weights(model, graph, {LAYER: [Scheme.parse(scheme)]}, calls())
    assert not torch.equal(
        output(model, graph, ranged, weights, calls()[0]),
        output(model, graph, scheme, together, calls()[0]),
    )


def test_inside_one_block_calls_of_both_ranges_take_turns(
    case: tuple[PlainDenoiser, OpGraph],
) -> None:
    model, graph = case
    scheme, own = (
        Scheme.parse("uint3-c+a8~balance~steps2"),
        model.get_submodule(LAYER).weight.data.clone(),
    )
    weights = calibrated_weights(model, graph, {LAYER: [scheme]}, calls())

    with simulate(model, {LAYER: scheme}, graph, weights):
        seen = []
        for i in (0, 3, 0):
            model(**calls()[i].kwargs)
            seen.append(model.get_submodule(LAYER).weight.data.clone())

    assert torch.equal(seen[0], weights.get(LAYER, scheme, 0))
    assert torch.equal(seen[1], weights.get(LAYER, scheme, 1))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(model.get_submodule(LAYER).weight.data, own)
    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_a_timestep_between_two_belongs_to_the_nearer_range() -> None:
    ranges = StepRanges(((900.0, 700.0), (300.0,)), ({}, {}))

    assert [ranges.place(t) for t in (999.0, 510.0, 490.0, 0.0)] == [0, 0, 1, 1]


def test_calls_are_cut_by_their_timesteps_and_not_by_their_order(
    case: tuple[PlainDenoiser, OpGraph],
) -> None:
    found = cut(case[0], [calls()[i] for i in (2, 0, 3, 1, 0)], 2)

    assert [sorted(c.step for c in part) for part in found] == [[0, 0, 1], [2, 3]]


def test_too_few_steps_for_the_ranges_are_refused(case: tuple[PlainDenoiser, OpGraph]) -> None:
    with pytest.raises(QSearchError, match="2 ranges of steps need calls of as many steps"):
        calibrated_weights(*case, {LAYER: [Scheme.parse("keep+a8t~steps2")]}, plain_calls(3))


def test_a_denoiser_that_is_told_no_timestep_is_refused() -> None:
    with pytest.raises(
        QSearchError,
        match="ranges of steps go by the argument 'timestep' of the denoiser; Linear was called with input",
    ):
        time_of(nn.Linear(2, 2), (torch.zeros(1, 2),), {})


def test_ranges_without_calibration_say_where_it_comes_from(
    case: tuple[PlainDenoiser, OpGraph],
) -> None:
    with pytest.raises(
        QSearchError, match=r"goes by 2 ranges of steps; give what `calibrated_weights` makes"
    ):
        simulate(case[0], {LAYER: Scheme.parse("keep+a8t~steps2")}, case[1]).__enter__()


def test_profiling_prices_schemes_with_ranges(case: tuple[PlainDenoiser, OpGraph]) -> None:
    values = profile(
        *case, ["uint8-c+a4t", "uint8-c+a4t~steps2"], calls(), estimator="sweep"
    ).values("noise")

    assert sum(row["uint8-c+a4t~steps2"] for row in values.values()) < sum(
        row["uint8-c+a4t"] for row in values.values()
    )


def test_probes_refuse_schemes_with_ranges(case: tuple[PlainDenoiser, OpGraph]) -> None:
    with pytest.raises(QSearchError, match="probes move one weight for all steps"):
        profile(*case, ["uint8-c~balance~steps2"], calls(), estimator="probe")
