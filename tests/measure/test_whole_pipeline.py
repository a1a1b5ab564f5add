"""Sensitivity of text encoders and VAEs: gradients through the sampler agree with changing one
layer at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges, clock_of
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    example_inputs,
    model_of,
    record,
    run,
)
from qsearch.measure.profiling import profile_pipeline
from tests.tiny_pipelines import build

COMPONENTS = ("vae", "text_encoder", "transformer")
PROMPTS, SAMPLING = Prompts(("red circle", "two blue squares")), Sampling(steps=3, guidance=3.0)
SCHEMES = ("uint4-c", "uint8-c")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build("pixart_alpha")


@pytest.fixture(scope="module")
def graph(pipe: Any) -> OpGraph:
    model = model_of(pipe, COMPONENTS)
    call, *_ = record(pipe, PROMPTS, SAMPLING, 1, components=COMPONENTS)
    return extract(model, example_inputs(call, model))


def test_probes_reach_every_component_and_agree_with_a_sweep(pipe: Any, graph: OpGraph) -> None:
    found = {
        estimator: profile_pipeline(
            pipe,
            graph,
            PROMPTS,
            SAMPLING,
            schemes=SCHEMES[1:],
            metrics=("psnr",),
            mode="trajectory",
            estimator=estimator,
            probes=16,
        ).values("psnr")
        for estimator in ("probe", "sweep")
    }

    for component in graph.components:
        names = [n for n in found["sweep"] if n.startswith(f"{component}.")]
        probed, swept = (
            torch.tensor([values[n]["uint8-c"] for n in names]) for values in found.values()
        )
        assert 0.4 < probed.sum() / swept.sum() < 2.5, component
        order = torch.corrcoef(
            torch.stack([probed.argsort().argsort(), swept.argsort().argsort()]).double()
        )
        assert order[0, 1] > 0.7, component


def test_calls_of_all_components_are_recorded_and_run_again(pipe: Any, graph: OpGraph) -> None:
    calls = record(pipe, PROMPTS, SAMPLING, 1, 1, graph.components)
    model = model_of(pipe, graph.components)

    held = [call.component for call in calls]
    assert held == sorted(held)  # text_encoder, transformer, vae
    assert held.count("vae") == 2  # one sample at a time
    shapes = {call.component: tuple(run(model, call).shape) for call in calls}
    assert shapes["text_encoder"][2:] == (16,)
    assert shapes["vae"] == (1, 3, 16, 16)
    assert set(calibrate(model, graph, calls)) == {layer.name for layer in graph.quantizable}


def test_layers_that_no_call_runs_are_named_and_not_dropped(pipe: Any, graph: OpGraph) -> None:
    model = model_of(pipe, graph.components)
    calls = [
        c
        for c in record(pipe, PROMPTS, SAMPLING, 1, None, graph.components)
        if c.component != "vae"
    ]

    with pytest.raises(QSearchError, match=r"calls for calibration run 23 of 39 layers, not vae\."):
        calibrate(model, graph, calls)
    assert len(calibrate(model, graph, calls, some=True)) == 23


def test_all_components_go_by_one_clock_and_a_single_denoiser_is_itself(pipe: Any) -> None:
    whole = model_of(pipe, COMPONENTS)

    assert whole is model_of(pipe, tuple(reversed(COMPONENTS)))
    assert clock_of(whole) is clock_of(pipe.transformer) is clock_of(pipe.vae)
    assert model_of(pipe, ("transformer",)) is pipe.transformer is model_of(pipe)
    with pytest.raises(QSearchError, match=r"has no component 'vea'; did you mean 'vae'\?"):
        model_of(pipe, ("vea",))


def test_what_runs_outside_the_steps_has_one_scheme(graph: OpGraph) -> None:
    steps = StepRanges.equal(2)
    plan: dict[str, Any] = {layer.name: "keep" for layer in graph}
    name = next(x.name for x in graph.quantizable if x.name.startswith("vae."))

    with pytest.raises(QSearchError, match=r"vae runs in none of the sampler's steps, so vae\."):
        Plan.make(graph, plan | {name: ["uint4-c", "uint8-c"]}, steps=steps)
    assert (
        Plan.make(graph, plan | {name: ["uint4-c", "uint4-c"]}, steps=steps).steps == StepRanges()
    )
