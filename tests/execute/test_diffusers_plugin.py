"""diffusers loads a pipeline's denoiser by a plan: packed as it is read, saved packed, loaded again
without being quantized again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsearch import Plan, QSearchError, extract, simulate
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.diffusers import QSearchConfig
from qsearch.measure.pipelines import run
from tests.execute.exporting import full, noise

SCHEMES = [
    "uint4-c",
    "int8-c",
    "keep",
    "e4m3-c",
    "km3-c",
    "uint4-g32@hqq",
    "nvfp4",
    "mxfp8",
    "int3-g16",
]
EXACT = 1e-12


def plan_of(graph: OpGraph, schemes: list[str]) -> Plan:
    return Plan.make(
        graph, {layer.name: schemes[i % len(schemes)] for i, layer in enumerate(graph)}
    )


def saved(folder: Path, graph: OpGraph, schemes: list[str]) -> Path:
    """plan.json and graph.json side by side."""
    graph.save(folder / "graph.json")
    plan_of(graph, schemes).save(folder / "plan.json")
    return folder / "plan.json"


def output(model: nn.Module, name: str) -> torch.Tensor:
    return run(model, full(name)[3])


def simulated(name: str, graph: OpGraph, schemes: list[str]) -> torch.Tensor:
    model, _, _, call = full(name)
    with simulate(model, plan_of(graph, schemes), graph):
        return run(model, call)


@pytest.mark.parametrize("name", ["scenes-dit", "scenes-unet"])
def test_from_pretrained_packs_what_the_plan_says_and_save_pretrained_keeps_it(
    name: str, tmp_path: Path
) -> None:
    model, graph, source, _ = full(name)
    part = "unet" if "unet" in name else "transformer"
    path = saved(tmp_path, graph, SCHEMES)

    made = type(model).from_pretrained(
        source, subfolder=part, quantization_config=QSearchConfig(path), torch_dtype=torch.float32
    )
    made.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed", torch_dtype=torch.float32)

    wanted = simulated(name, graph, SCHEMES)
    assert noise(output(made, name), wanted) < EXACT
    assert noise(output(again, name), wanted) < EXACT
    plan = plan_of(graph, SCHEMES)
    for loaded in (made, again):
        assert {
            n: str(m.scheme)
            for n, m in loaded.named_modules()
            if isinstance(getattr(m, "scheme", None), Scheme) and hasattr(m, "parts")
        } == {n: str(s) for n, s in plan.layers.items() if s != Scheme("keep")}
    size = (tmp_path / "packed" / "diffusion_pytorch_model.safetensors").stat().st_size
    full_size = (source / part / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.55 * full_size
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "qsearch"
    assert said["layers"] == {n: str(s) for n, s in plan.layers.items()}


def test_weights_are_packed_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qsearch.execute import diffusers_plugin

    model, graph, source, _ = full("scenes-dit")
    own, seen = diffusers_plugin.QSearchQuantizer._pack, []

    def pack(
        self: Any, model: nn.Module, name: str, stored: torch.Tensor, cast: torch.Tensor
    ) -> None:
        own(self, model, name, stored, cast)
        real = [
            m
            for m in model.modules()
            if type(m) in (nn.Linear, nn.Conv2d) and m.weight.device.type != "meta"
        ]
        seen.append(len(real))

    monkeypatch.setattr(diffusers_plugin.QSearchQuantizer, "_pack", pack)
    type(model).from_pretrained(
        source,
        subfolder="transformer",
        quantization_config=QSearchConfig(saved(tmp_path, graph, ["uint4-c"])),
    )

    assert len(seen) == len(graph.layers)
    assert max(seen) == 0  # when a weight is packed, no other layer holds one in full precision


def test_a_pipeline_takes_it_for_one_of_its_components(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    _, graph, source, _ = full("scenes-dit")
    config = PipelineQuantizationConfig(
        quant_mapping={"transformer": QSearchConfig(saved(tmp_path, graph, SCHEMES))}
    )

    pipe = DiffusionPipeline.from_pretrained(source, quantization_config=config)

    assert (
        noise(output(pipe.transformer, "scenes-dit"), simulated("scenes-dit", graph, SCHEMES))
        < EXACT
    )


def test_inputs_are_rounded_where_the_plan_rounds_them(tmp_path: Path) -> None:
    model, graph, source, call = full("scenes-dit")
    schemes = ["int8-c+a8", "keep+a8"]

    made = type(model).from_pretrained(
        source,
        subfolder="transformer",
        quantization_config=QSearchConfig(saved(tmp_path, graph, schemes)),
        torch_dtype=torch.float32,
    )

    reference = run(model, call)
    damage = noise(simulated("scenes-dit", graph, schemes), reference)
    assert 0.5 * damage < noise(output(made, "scenes-dit"), reference) < 2 * damage


def test_another_type_leaves_the_codes_as_they_are(tmp_path: Path) -> None:
    model, graph, source, _ = full("scenes-dit")
    config = QSearchConfig(saved(tmp_path, graph, ["uint4-g32"]))

    whole = type(model).from_pretrained(
        source, subfolder="transformer", quantization_config=config, torch_dtype=torch.float32
    )
    whole.save_pretrained(tmp_path / "packed")
    half = type(model).from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)

    for name, buffer in whole.named_buffers():
        if ".parts." in name:
            assert torch.equal(half.get_buffer(name), buffer), name


def test_a_plan_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model, _, source, _ = full("scenes-dit")
    config = QSearchConfig(layers={"transformer_blocks.99.attn1.to_q": "int8-c"})

    with pytest.raises(
        QSearchError,
        match=r"no layer 'transformer_blocks.99.attn1.to_q'.*did you mean 'transformer_blocks",
    ):
        type(model).from_pretrained(source, subfolder="transformer", quantization_config=config)


@pytest.mark.parametrize("scheme", ["int4-g32@gptq", "int8-c+a8t", "int8-c+a8~balance"])
def test_schemes_that_want_calibration_are_refused_with_the_verb_that_has_it(
    scheme: str, tmp_path: Path
) -> None:
    model, graph, source, _ = full("scenes-dit")

    with pytest.raises(QSearchError, match="qsearch apply"):
        type(model).from_pretrained(
            source,
            subfolder="transformer",
            quantization_config=QSearchConfig(saved(tmp_path, graph, [scheme])),
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"plan": "missing.json"},
        {"layers": {"a": "int9-c"}},
        {"layers": ["a"]},
        {"layers": {1: "keep"}},
        {"plan": "a", "layers": {}},
    ],
)
def test_a_config_that_is_no_plan_is_an_error_that_teaches(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(QSearchError):
        QSearchConfig(**wrong)


def test_a_plan_from_python_brings_its_graph() -> None:
    _, graph, _, _ = full("scenes-dit")

    assert (
        QSearchConfig(Plan.uniform(graph, "int8-c"), graph).to_dict()["layers"]["proj_out"]
        == "int8-c"
    )
    with pytest.raises(QSearchError, match="needs its graph"):
        QSearchConfig(Plan.uniform(graph, "int8-c"))
    other = OpGraph("other", graph.layers[:-1])
    with pytest.raises(QSearchError, match="make a plan for this model"):
        QSearchConfig(Plan.uniform(graph, "int8-c"), other)


def test_what_a_class_keeps_in_fp32_stays_so_beside_packed_layers(tmp_path: Path) -> None:
    from diffusers import SkyReelsV2Transformer3DModel

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
    }
    model = SkyReelsV2Transformer3DModel(**config, rope_max_seq_len=32).eval()
    given = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    graph = extract(model, given)
    packed = ("blocks.0.ffn.net.2", "condition_embedder.time_embedder.linear_1")
    plan = Plan.make(graph, {x.name: "int8-c" if x.name in packed else "keep" for x in graph})
    model.save_pretrained(tmp_path / "model")

    for again in range(2):  # quantized while it is read, then read as it was saved
        made = SkyReelsV2Transformer3DModel.from_pretrained(
            tmp_path / ("saved" if again else "model"),
            torch_dtype=torch.bfloat16,
            **({} if again else {"quantization_config": QSearchConfig(plan, graph)}),
        )
        kinds = {name: p.dtype for name, p in made.named_parameters()}
        assert kinds["scale_shift_table"] == kinds["blocks.0.norm2.weight"] == torch.float32
        assert kinds["condition_embedder.time_embedder.linear_2.weight"] == torch.float32
        assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
        low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
        with torch.no_grad(), simulate(model, plan, graph):
            wanted = model(**given, return_dict=False)[0]
        with torch.no_grad():
            output = made(**low, return_dict=False)[0].float()
        assert noise(output, wanted) < 1e-3
        if not again:
            made.save_pretrained(tmp_path / "saved")
