"""Plans over ranges of sampler steps at work: every call by its own range, in `simulate` and in
packed layers, and the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges, clock_of
from qsearch.execute.packed_file import load, save
from qsearch.execute.ranged import RangedLayer, layers_in
from qsearch.execute.runtime import apply, stored_bytes
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import (
    Call,
    Prompts,
    Sampling,
    denoiser_of,
    example_inputs,
    record,
    sample,
)
from qsearch.measure.quantized_weights import QuantizedWeights, weight_of, weights_for
from qsearch.measure.simulation import simulate
from tests import tiny_pipelines
from tests.models import PlainDenoiser, plain, plain_inputs

PROMPTS = Prompts(("a red circle left of a blue square",))
SAMPLING = Sampling(steps=5, guidance=3.0)
LAYER = "blocks.0.ff.2"
TWO = StepRanges.equal(2)


@pytest.fixture(scope="module")
def pipeline() -> tuple[Any, OpGraph]:
    torch.manual_seed(0)
    pipe = tiny_pipelines.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    model = denoiser_of(pipe)
    return pipe, extract(model, example_inputs(record(pipe, PROMPTS, SAMPLING, 1)[0], model))


@pytest.fixture(scope="module")
def case() -> tuple[PlainDenoiser, OpGraph]:
    return plain()


def calls() -> list[Call]:
    """A call at each of four steps; the later ones are louder."""
    out = []
    for i in range(4):
        given = plain_inputs(seed=20 + i)
        out.append(Call((), given | {"sample": given["sample"] * (1 + 3 * i)}, i, steps=4))
    return out


def everywhere(graph: OpGraph, *schemes: str, bounds: StepRanges | None = None) -> Plan:
    return Plan.make(
        graph,
        {x.name: list(schemes) if x.quantizable else "keep" for x in graph},
        steps=bounds or StepRanges.equal(len(schemes)),
    )


def at_one(graph: OpGraph, choices: Any, layer: str = LAYER) -> Plan:
    return Plan.make(
        graph, {x.name: choices if x.name == layer else "keep" for x in graph}, steps=TWO
    )


def made(model: nn.Module, call: Call) -> Tensor:
    with torch.no_grad(), clock_of(model).at(call.step, call.steps):
        found: Tensor = model(**call.kwargs)
        return found


@contextmanager
def levels_seen(model: nn.Module, layer: str) -> Iterator[list[int]]:
    """How many different weights a layer has in each call."""
    seen: list[int] = []
    handle = model.register_forward_hook(
        lambda *_: seen.append(min(9, len(weight_of(model, layer).unique())))
    )
    yield seen
    handle.remove()


def test_every_step_has_the_weights_of_its_range_in_every_run(
    pipeline: tuple[Any, OpGraph],
) -> None:
    pipe, graph = pipeline
    model, name = denoiser_of(pipe), graph.quantizable[0].name

    with (
        simulate(model, everywhere(graph, "uint2-t", "uint3-t", "keep"), graph),
        levels_seen(model, name) as seen,
    ):
        for _ in range(2):
            sample(pipe, PROMPTS, SAMPLING)

    assert seen == 2 * [4, 4, 8, 8, 9]  # 5 steps in 3 ranges: 0, 0, 1, 1, 2


def test_ranges_of_different_lengths_are_kept(pipeline: tuple[Any, OpGraph]) -> None:
    pipe, graph = pipeline
    model, name = denoiser_of(pipe), graph.quantizable[0].name
    plan = everywhere(graph, "uint2-t", "keep", bounds=StepRanges((0.7,)))

    with simulate(model, plan, graph), levels_seen(model, name) as seen:
        sample(pipe, PROMPTS, Sampling(steps=10, guidance=3.0))

    assert seen == [4] * 7 + [9] * 3


def test_afterwards_the_model_is_as_it_was(pipeline: tuple[Any, OpGraph]) -> None:
    pipe, graph = pipeline
    model = denoiser_of(pipe)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    with simulate(model, everywhere(graph, "uint2-t", "uint3-t+a4"), graph):
        sample(pipe, PROMPTS, SAMPLING)

    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set()
    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_fewer_steps_than_ranges_are_refused(pipeline: tuple[Any, OpGraph]) -> None:
    pipe, graph = pipeline
    plan = everywhere(graph, *["uint2-t", "uint3-t"] * 3)

    with (
        simulate(denoiser_of(pipe), plan, graph),
        pytest.raises(QSearchError, match="each of 6 ranges of steps needs a sampler step"),
    ):
        sample(pipe, PROMPTS, SAMPLING)


def test_a_bare_call_outside_of_any_sampler_is_refused(case: tuple[PlainDenoiser, OpGraph]) -> None:
    model, graph = case

    with (
        simulate(model, everywhere(graph, "uint2-t", "uint3-t"), graph),
        pytest.raises(QSearchError, match="goes by the sampler's steps, and no scheduler"),
    ):
        model(**plain_inputs())


@pytest.mark.parametrize("scheme", ["uint3-c+a8t~balance", "uint4-c+a4t", "keep+a4t~shift"])
def test_each_call_computes_with_the_calibration_of_its_own_range(
    case: tuple[PlainDenoiser, OpGraph], scheme: str
) -> None:
    model, graph = case
    ranged = at_one(graph, [scheme, scheme])
    weights = weights_for(model, graph, [ranged], calls())

    for i in (3, 0, 2, 1, 3):  # in any order
        part = calls()[:2] if i < 2 else calls()[2:]
        own = QuantizedWeights(model, graph, calibrate(model, graph, part, [LAYER]))
        with simulate(model, at_one(graph, scheme), graph, own):
            wanted = made(model, calls()[i])
        with simulate(model, ranged, graph, weights):
            assert torch.equal(made(model, calls()[i]), wanted)


def test_a_choice_for_all_ranges_is_calibrated_on_all_calls(
    case: tuple[PlainDenoiser, OpGraph],
) -> None:
    model, graph = case
    scheme = "uint3-c+a8t~balance"
    plan = at_one(graph, scheme)
    together = QuantizedWeights(model, graph, calibrate(model, graph, calls(), [LAYER]))

    with simulate(model, plan, graph, weights_for(model, graph, [plan], calls())):
        found = made(model, calls()[3])
    with simulate(model, plan, graph, together):
        assert torch.equal(made(model, calls()[3]), found)


def test_a_range_without_a_recorded_call_is_refused(case: tuple[PlainDenoiser, OpGraph]) -> None:
    model, graph = case
    plan = at_one(graph, ["keep+a8t", "keep+a6t"])

    with pytest.raises(QSearchError, match=r"need a recorded call each .* range 1 has none"):
        weights_for(model, graph, [plan], calls()[:2])


def test_ranges_without_calibration_say_where_it_comes_from(
    case: tuple[PlainDenoiser, OpGraph],
) -> None:
    plan = at_one(case[1], ["keep+a8t", "keep+a6t"])

    with pytest.raises(QSearchError, match="give what `weights_for` makes of the plan"):
        simulate(case[0], plan, case[1]).__enter__()


# ------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize(
    "choices",
    [
        ["int4-c+a8", "int4-c+a4"],
        ["uint4-c", "uint8-c+a8"],
        ["keep", "int8-c+a8"],
        ["uint4-c+a8t", "uint4-c+a8t"],
        ["uint4-c+a8~balance30", "uint4-c+a8~balance30"],
        ["int8-c+a8t~shift", "keep"],
    ],
)
def test_packed_layers_compute_in_every_range_what_simulate_computes(choices: list[str]) -> None:
    model, graph = plain()
    plan = at_one(graph, choices)
    weights = weights_for(model, graph, [plan], calls())
    with simulate(model, plan, graph, weights):
        wanted = [made(model, call) for call in calls()]

    apply(model, plan, graph, weights)

    for call, y in zip(calls(), wanted, strict=True):
        assert (made(model, call) - y).abs().max() <= 2e-5 * y.abs().max()
    for i in (3, 0):
        assert (made(model, calls()[i]) - wanted[i]).abs().max() <= 2e-5 * wanted[i].abs().max()


def test_one_weight_for_all_ranges_is_stored_once() -> None:
    sizes = []
    for choices in ("uint4-c", ["uint4-c", "uint4-c+a8"], ["uint4-c", "uint8-c"]):
        model, graph = plain()
        apply(model, at_one(graph, choices), graph)
        sizes.append(stored_bytes(model))
        assert isinstance(layers_in(model)[LAYER], RangedLayer) == (choices != "uint4-c")

    assert sizes[0] == sizes[1] < sizes[2]


@pytest.mark.parametrize("choices", [["int4-c+a8", "int4-c+a4"], ["uint4-c", "uint8-c+a8t"]])
def test_a_packed_model_over_ranges_comes_back_from_its_file(
    choices: list[str], tmp_path: Any
) -> None:
    model, graph = plain()
    plan = at_one(graph, choices)
    apply(model, plan, graph, weights_for(model, graph, [plan], calls()))
    save(model, tmp_path / "model.safetensors", graph, plan)

    other = load(tmp_path / "model.safetensors", plain()[0], graph)

    for call in calls():
        torch.testing.assert_close(made(other, call), made(model, call), rtol=0, atol=5e-6)
    assert stored_bytes(other) == stored_bytes(model)


def test_a_packed_denoiser_finds_the_steps_of_the_pipeline_that_calls_it(
    pipeline: tuple[Any, OpGraph],
) -> None:
    _, graph = pipeline
    torch.manual_seed(0)
    pipe = tiny_pipelines.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    model = denoiser_of(pipe)
    plan = everywhere(graph, "uint3-c", "uint8-c+a8", bounds=StepRanges((0.6,)))
    with simulate(model, plan, graph):
        wanted = sample(pipe, PROMPTS, SAMPLING)
    apply(model, plan, graph)
    seen: list[int] = []
    first = next(m for m in model.modules() if isinstance(m, RangedLayer))
    model.register_forward_hook(lambda *_: seen.append(first.now))

    generator = [torch.Generator().manual_seed(0)]
    found = pipe(
        list(PROMPTS.texts),
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=generator,
        output_type="latent",
    ).images

    assert seen == [0, 0, 0, 1, 1]
    assert (found.float() - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_a_compiled_denoiser_follows_the_steps_and_compiles_each_range_once() -> None:
    from torch._dynamo.testing import CompileCounter

    model, graph = plain()
    plan = at_one(graph, ["int8-c+a8", "uint4-c"])
    with simulate(model, plan, graph):
        wanted = [made(model, call) for call in calls()]
    apply(model, plan, graph)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)

    def ran(call: Call) -> Tensor:
        with torch.no_grad(), clock_of(model).at(call.step, call.steps):
            found: Tensor = compiled(**call.kwargs)
            return found

    for call, y in zip(calls(), wanted, strict=True):
        torch.testing.assert_close(ran(call), y, rtol=0, atol=2e-5)
    once = counter.frame_count
    for i in (3, 0, 1, 2, 0, 3):
        torch.testing.assert_close(ran(calls()[i]), wanted[i], rtol=0, atol=2e-5)
    assert counter.frame_count == once


def test_diffusers_own_loading_packs_a_plan_over_ranges(
    pipeline: tuple[Any, OpGraph], tmp_path: Any
) -> None:
    from diffusers import UNet2DConditionModel

    from qsearch.diffusers import QSearchConfig

    pipe, graph = pipeline
    model = denoiser_of(pipe)
    plan = everywhere(graph, "uint4-c", "uint4-c+a8", "keep", bounds=StepRanges((0.4, 0.8)))
    full = sample(pipe, PROMPTS, SAMPLING)
    with simulate(model, plan, graph):
        wanted = sample(pipe, PROMPTS, SAMPLING)
    pipe.save_pretrained(tmp_path / "pipe")
    own = UNet2DConditionModel.from_pretrained(
        tmp_path / "pipe" / "unet", quantization_config=QSearchConfig(plan, graph)
    )
    own.save_pretrained(tmp_path / "packed")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "packed")

    made = []
    for packed in (own, again):
        with torch.no_grad():
            pipe.unet = packed
            made.append(sample(pipe, PROMPTS, SAMPLING))
    pipe.unet = model
    assert torch.equal(*made)
    # an input that lies between two codes is rounded either way, and moves all later steps a little
    assert (made[0] - wanted).norm() <= 0.01 * (wanted - full).norm()
