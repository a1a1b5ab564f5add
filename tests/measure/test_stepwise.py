"""A step-wise plan at work: every sampler step by its own bin, and the model as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import BitPlan
from qsearch.core.stepplan import StepPlan
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Prompts, Sampling, denoiser_of, example_inputs, record, sample
from qsearch.measure.simulation import simulate, weight_of
from qsearch.measure.stepwise import simulate_steps
from tests import tiny_pipelines

PROMPTS = Prompts(("a red circle left of a blue square",))
SAMPLING = Sampling(steps=5, guidance=3.0)


@pytest.fixture(scope="module")
def case() -> tuple[Any, OpGraph]:
    torch.manual_seed(0)
    pipe = tiny_pipelines.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    model = denoiser_of(pipe)
    return pipe, extract(model, example_inputs(record(pipe, PROMPTS, SAMPLING, 1)[0], model))


def stepped(graph: OpGraph, *schemes: str) -> StepPlan:
    return StepPlan.make(
        graph, {x.name: [s if x.quantizable else "keep" for s in schemes] for x in graph}
    )


def test_bins_with_one_scheme_make_what_the_plan_makes(case: tuple[Any, OpGraph]) -> None:
    pipe, graph = case
    with simulate(denoiser_of(pipe), BitPlan.uniform(graph, "uint4-c"), graph):
        expected = sample(pipe, PROMPTS, SAMPLING)

    with simulate_steps(pipe, stepped(graph, "uint4-c", "uint4-c"), graph):
        made = sample(pipe, PROMPTS, SAMPLING)

    assert torch.equal(made, expected)
    assert not torch.equal(made, sample(pipe, PROMPTS, SAMPLING))


def test_every_step_has_the_weights_of_its_bin_in_every_run(case: tuple[Any, OpGraph]) -> None:
    pipe, graph = case
    model, name = denoiser_of(pipe), graph.quantizable[0].name
    levels: list[int] = []
    with simulate_steps(pipe, stepped(graph, "uint2-t", "uint3-t", "keep"), graph):
        handle = model.register_forward_hook(
            lambda *_: levels.append(len(weight_of(model, name).unique()))
        )
        for _ in range(2):
            sample(pipe, PROMPTS, SAMPLING)
        handle.remove()

    many = len(weight_of(model, name).unique())
    assert [min(n, 9) for n in levels] == 2 * [4, 4, 8, 8, 9]  # 5 steps in 3 bins: 0, 0, 1, 1, 2
    assert levels[4] == many


def test_afterwards_the_model_and_the_gradient_mode_are_as_they_were(
    case: tuple[Any, OpGraph],
) -> None:
    pipe, graph = case
    before = {k: v.clone() for k, v in denoiser_of(pipe).state_dict().items()}

    with simulate_steps(pipe, stepped(graph, "uint2-t", "uint3-t"), graph):
        sample(pipe, PROMPTS, SAMPLING)

    assert {
        k for k, v in denoiser_of(pipe).state_dict().items() if not torch.equal(v, before[k])
    } == set()
    assert torch.is_grad_enabled()
    assert {"step", "set_timesteps"}.isdisjoint(vars(pipe.scheduler))


def test_fewer_steps_than_bins_are_refused(case: tuple[Any, OpGraph]) -> None:
    pipe, graph = case

    with (
        pytest.raises(
            QSearchError,
            match="a plan for 6 bins of steps needs as many sampler steps at least; given 5",
        ),
        simulate_steps(pipe, stepped(graph, *["uint4-c"] * 6), graph),
    ):
        sample(pipe, PROMPTS, SAMPLING)


def test_a_pipeline_without_a_scheduler_is_refused(case: tuple[Any, OpGraph]) -> None:
    pipe, graph = case

    class Bare:
        unet = denoiser_of(pipe)

    with (
        pytest.raises(QSearchError, match="goes by the scheduler's steps; Bare has no scheduler"),
        simulate_steps(Bare(), stepped(graph, "keep"), graph),
    ):
        pass
