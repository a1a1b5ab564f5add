"""A streamed model is packed into its file a layer at a time, as one in memory is packed and
saved.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from qsearch.execute import packed_file
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
    run,
)
from tests import tiny_pipelines

SAMPLING = Sampling(steps=2, guidance=4.0, batch=2, resolution=32)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_streamed_model_is_packed_into_the_file_of_one_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_pipelines.build("flux").save_pretrained(tmp_path / "pipe")
    pipe = load_pipeline(tmp_path / "pipe")
    model = model_of(pipe)
    call, *_ = record(pipe, Prompts(("a red circle",)), SAMPLING, bins=1)
    graph = extract(model, example_inputs(call, model))
    schemes = ("int4-g16", "uint3-c", "keep", "int8-c+a8")
    plan = Plan.make(
        graph,
        {x.name: schemes[i % 4] if x.quantizable else "keep" for i, x in enumerate(graph)},
    )
    streamed = model_of(load_pipeline(tmp_path / "pipe", offload="disk"))

    packed_file.pack(streamed, tmp_path / "streamed.safetensors", graph, plan)
    apply(model, plan, graph)
    packed_file.save(model, tmp_path / "whole.safetensors", graph, plan)

    made = [load_file(tmp_path / f"{name}.safetensors") for name in ("streamed", "whole")]
    assert set(made[0]) == set(made[1])
    for name, tensor in made[0].items():
        assert tensor.dtype == made[1][name].dtype
        assert torch.equal(tensor, made[1][name]), name
    loaded = packed_file.load(
        tmp_path / "streamed.safetensors", packed_file.skeleton(tmp_path / "pipe"), graph
    )
    torch.testing.assert_close(run(loaded, call), run(model, call), rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("*.parts"))
    ranged = Plan.make(
        graph,
        {x.name: ("keep", "uint3-c" if x.quantizable else "keep") for x in graph},
        steps=StepRanges.equal(2),
    )
    with pytest.raises(QSearchError, match="pack it with offload none"):
        packed_file.pack(streamed, tmp_path / "ranged.safetensors", graph, ranged)
    with pytest.raises(QSearchError, match="a layer at a time"):
        apply(streamed, plan, graph)
