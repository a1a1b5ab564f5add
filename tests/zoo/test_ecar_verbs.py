"""scenes-ecar through the verbs: two networks in one graph and one plan, stages as ranges of
steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsearch import zoo
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.components import denoisers_of, model_of
from qsearch.measure.evaluation import make
from qsearch.measure.loading import load_pipeline
from qsearch.measure.own import own_of
from qsearch.measure.pipelines import (
    Sampling,
    example_inputs,
    record,
    sample,
    scene_prompts,
)
from qsearch.measure.profiling import profile
from qsearch.measure.trajectory import trajectories
from tests.conftest import Command

STAGES, STEPS = 3, 6
SAMPLING = Sampling(steps=STEPS, guidance=4.0, seed=3, batch=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(zoo.folder("scenes-ecar"))


@pytest.fixture(scope="module")
def calls(pipe: Any) -> list[Any]:
    return record(pipe, scene_prompts(2, 0), SAMPLING, STAGES)


@pytest.fixture(scope="module")
def graph(pipe: Any, calls: list[Any]) -> OpGraph:
    model = model_of(pipe)
    return extract(model, example_inputs(calls[0], model), name="scenes-ecar")


def test_both_networks_denoise_and_the_transformer_is_called_once_a_stage(
    pipe: Any, graph: OpGraph
) -> None:
    every = record(pipe, scene_prompts(1, 0), SAMPLING, STEPS)

    assert list(denoisers_of(pipe)) == ["transformer", "flow"]
    assert set(graph.components) == {"transformer", "flow"}
    assert {layer.name.partition(".")[0] for layer in graph} == {"transformer", "flow"}
    assert [c.step for c in every if c.component == "flow"] == list(range(STEPS))
    assert [c.step for c in every if c.component == "transformer"] == [0, 2, 4]


def test_probes_follow_errors_of_both_networks_through_the_generation(
    pipe: Any, graph: OpGraph
) -> None:
    heard = trajectories(pipe, scene_prompts(2, 0), SAMPLING, 1)

    table = profile(
        model_of(pipe), graph, ("uint3-c",), heard, pipe=pipe, metrics=("sqnr",), probes=2
    )

    assert table.responses is not None
    shares = table.responses.values["sqnr", 0]  # [choices, sampler steps, probes, parts]
    for row, (site, _) in enumerate(table.responses.choices):
        steps = set(abs(shares[row]).max((1, 2)).nonzero()[0])
        called = {0, 2, 4} if site.startswith("transformer.") else set(range(STEPS))
        assert steps, f"{site} changes nothing"
        assert steps <= called, f"{site} adds something in the steps {steps}"


def test_a_plan_treats_a_stage_apart_and_a_packed_model_is_the_simulated_one(
    graph: OpGraph, tmp_path: Path
) -> None:
    pipe = load_pipeline(zoo.folder("scenes-ecar"))
    held: dict[str, Any] = {
        layer.name: ["uint4-c", "uint4-c", "uint8-c"] for layer in graph.quantizable
    }
    plan = Plan.make(graph, held, steps=StepRanges.equal(STAGES))
    plan.save(tmp_path / "plan.json")
    prompts = scene_prompts(2, 1)
    kept = make(pipe, graph, Plan.uniform(graph, "keep"), prompts, SAMPLING)
    expected = make(pipe, graph, plan, prompts, SAMPLING)

    apply(model_of(pipe), Plan.load(tmp_path / "plan.json", graph), graph)
    made = sample(pipe, prompts, SAMPLING)

    changed = (expected.latents - kept.latents).norm()
    assert changed > 0
    assert (made - expected.latents).norm() < 1e-3 * changed


def test_its_own_settings_are_twelve_steps_and_the_zoo_s_metrics() -> None:
    own = own_of(zoo.folder("scenes-ecar"))

    assert (own.steps, own.size, own.makes) == (12, (64, 64), "pictures")
    assert own.metrics() == ("sqnr", "ssim", "frechet", "alignment")


def test_fewer_steps_than_stages_and_another_models_plan_are_one_line(
    tmp_path: Path, graph: OpGraph, command: Command, other_graph: OpGraph
) -> None:
    few = command("extract", "scenes-ecar", "-o", tmp_path / "few", "--steps", 2)
    Plan.uniform(other_graph, "int8-c").save(tmp_path / "plan.json")
    made = command("extract", "scenes-ecar", "-o", tmp_path / "run", "--steps", 3)
    other = command("evaluate", tmp_path / "run", "--given", tmp_path / "plan.json")

    assert (few[0], made[0], other[0]) == (2, 0, 2), (few, made, other)
    assert "3 stages" in " ".join(few[2].split())
    assert "Traceback" not in few[2] + other[2]
    assert other_graph.id in other[2] or "another" in other[2]


def test_gradients_are_not_left_on(pipe: Any) -> None:
    assert torch.is_grad_enabled()
    assert not any(p.grad is not None for p in model_of(pipe).parameters())
