"""Placement: a model that comes with a device_map, or with accelerate's hooks, stays where they put
it; what needs weights that stay is refused before any work.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.execute.runtime import apply, packed_layers
from qsearch.graphs.extraction import extract
from qsearch.measure import loading
from qsearch.measure.loading import load_pipeline
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    decode,
    example_inputs,
    record,
    run,
    sample,
)
from qsearch.measure.placement import check_weights_stay, device_of, is_placed, placement
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from tests.layer_outputs import compare_layers
from tests.tiny_pipelines import build

#: accelerate's own word on parameters of the model itself, which a device_map names all the same
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
PROMPTS, SAMPLING = Prompts(("a red square",)), Sampling(steps=1)
ASKED: dict[str, Any] = {"schemes": ("int4-c", "int8-c+a8"), "bins": 1, "batch": 1, "probes": 2}


@pytest.fixture(scope="module")
def plain() -> Any:
    return build("pixart_sigma")


def dispatched(plain: Any, where: dict[str, str], folder: Path, part: str = "transformer") -> Any:
    """A copy of the pipeline with one part under accelerate's hooks."""
    pipe = copy.deepcopy(plain)
    model = getattr(pipe, part)
    (folder / "offloaded").mkdir(exist_ok=True)
    dispatch_model(model, where, offload_dir=str(folder / "offloaded"), force_hooks=True)
    return pipe


def split(model: Any) -> dict[str, str]:
    """The first child on disk, the others in memory."""
    names = [n for n, m in model.named_children() if list(m.parameters())]
    return {n: "disk" if i == 0 else "cpu" for i, n in enumerate(names)} | {
        n: "cpu" for n, _ in model.named_parameters() if "." not in n
    }


def test_a_model_under_hooks_is_measured_as_the_same_model_without(
    plain: Any, tmp_path: Path
) -> None:
    pipe = dispatched(plain, {"": "cpu"}, tmp_path)
    call = record(plain, PROMPTS, SAMPLING, 1)[0]
    graph = extract(plain.transformer, example_inputs(call, plain.transformer))
    said: list[str] = []

    table = profile_pipeline(pipe, graph, PROMPTS, SAMPLING, say=said.append, **ASKED)

    wanted = profile_pipeline(plain, graph, PROMPTS, SAMPLING, **ASKED)
    assert table.frame["estimate"].tolist() == wanted.frame["estimate"].tolist()
    assert "transformer is placed by its own device_map on cpu: left there" in said
    plan = Plan.uniform(graph, "int8-c+a8")
    with simulate(plain.transformer, plan, graph):
        simulated = run(plain.transformer, call)
    with simulate(pipe.transformer, plan, graph):
        assert torch.equal(run(pipe.transformer, call), simulated)
    apply(pipe.transformer, plan, graph)
    packed = packed_layers(pipe.transformer)
    assert packed and all("_hf_hook" in vars(layer) for layer in packed.values())
    weights = QuantizedWeights(plain.transformer, graph)
    compare_layers(plain.transformer, pipe.transformer, plan.layers, graph, weights, call)


def test_a_model_that_is_split_is_sampled_and_is_refused_where_weights_must_stay(
    plain: Any, tmp_path: Path
) -> None:
    pipe = dispatched(plain, split(plain.transformer), tmp_path)
    call = record(pipe, PROMPTS, SAMPLING, 1)[0]
    graph = extract(pipe.transformer, example_inputs(call, pipe.transformer))

    assert torch.equal(sample(pipe, PROMPTS, SAMPLING), sample(plain, PROMPTS, SAMPLING))
    assert graph.id == extract(plain.transformer, example_inputs(call, plain.transformer)).id
    assert placement(pipe) == (
        "transformer is placed by its own device_map on disk, cpu: left there"
    )
    words = r"on the meta device between calls.* `offload: disk` .*load_pipeline\(folder, offload="
    with pytest.raises(QSearchError, match=words):
        profile_pipeline(pipe, graph, PROMPTS, SAMPLING, **ASKED)
    plan = Plan.uniform(graph, "int4-c")
    with pytest.raises(QSearchError, match=words), simulate(pipe.transformer, plan, graph):
        pass
    with pytest.raises(QSearchError, match=words):
        apply(pipe.transformer, plan, graph)
    with pytest.raises(QSearchError) as refused:
        check_weights_stay(pipe.transformer)
    assert "\n" not in str(refused.value)


def test_parts_that_are_only_called_may_be_offloaded(plain: Any) -> None:
    pipe = copy.deepcopy(plain)
    latents = sample(plain, PROMPTS, SAMPLING)
    wanted = decode(plain, latents, sampling=SAMPLING, prompts=PROMPTS)
    for part in (pipe.vae, pipe.text_encoder):
        cpu_offload(part, torch.device("cpu"), offload_buffers=True)

    assert torch.equal(sample(pipe, PROMPTS, SAMPLING), latents)
    assert torch.equal(decode(pipe, latents, sampling=SAMPLING, prompts=PROMPTS), wanted)
    assert device_of(pipe.vae) == torch.device("cpu")
    assert "vae is placed by its own offload hooks on cpu, offloaded" in placement(pipe)
    check_weights_stay(pipe.transformer)


def test_loading_leaves_a_part_where_its_device_map_put_it(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.save_pretrained(tmp_path / "saved")
    pipe = dispatched(plain, split(plain.transformer), tmp_path)

    class Loads:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return pipe

    monkeypatch.setattr(loading, "pipeline_class", lambda folder: Loads)

    loaded = load_pipeline(tmp_path / "saved")  # accelerate raises where such a model is moved

    assert is_placed(loaded.transformer) and not is_placed(loaded.vae)
    assert any(p.is_meta for p in loaded.transformer.parameters())


def test_a_pipeline_without_a_device_map_has_nothing_to_say(plain: Any) -> None:
    assert placement(plain) == "" and placement(plain.transformer) == ""
    check_weights_stay(plain.transformer)
