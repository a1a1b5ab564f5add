"""The tools themselves load what was exported, on a CPU: each layer's format is the plan's, and the
output is what `simulate` says.

Tolerances are relative noise powers of the tool's output against `simulate`'s: 1e-12 where the tool
computes with our codes in fp32, 1e-7 where it unpacks in fp16 (GGUF in diffusers). Rounded inputs
differ where a scale differs in its last bit, so that they are compared layer by layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qsearch import Plan, QSearchError, simulate
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporting import formats
from qsearch.execute.exports import export
from qsearch.execute.one_algorithm import modules
from qsearch.measure.pipelines import run
from tests.execute.exporting import compare, full, needs, noise, plan_for
from tests.execute.tool_loaders import (
    gguf_scheme,
    quanto_formats,
    sdnq_formats,
    torchao_formats,
)

EXACT, HALF = 1e-12, 1e-7
Loaded = tuple[Any, Plan, OpGraph]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


def exported(to: str, name: str, schemes: list[str], folder: Path) -> tuple[Path, Plan]:
    """An export of a zoo model in fp32 with `schemes` in turn."""
    needs(to)
    _, graph, source, _ = full(name)
    plan = plan_for(to, graph, schemes)
    target = folder / f"{to}-{name}"
    export(plan, graph, source, to, target, force=True)
    return target, plan


def test_torchao_loads_its_tensors_and_computes_what_simulate_says(folder: Path) -> None:
    target, plan = exported(
        "torchao",
        "scenes-dit",
        ["int4-g32", "uint4-c", "int8-c", "e4m3-c", "keep", "uint5-g32@hqq", "int3-c", "int8-g32"],
        folder,
    )
    model, graph, _, call = full("scenes-dit")

    tool = type(model).from_pretrained(target, torch_dtype=torch.float32)

    assert torchao_formats(tool, graph) == formats(plan.layers)
    error, damage = compare(tool, model, plan, graph, call)
    assert error < EXACT < 1e-4 < damage


def test_torchao_rounds_inputs_as_simulate_does_layer_by_layer(folder: Path) -> None:
    target, plan = exported("torchao", "scenes-dit", ["int8-c+a8"], folder)
    model, graph, _, call = full("scenes-dit")
    tool = type(model).from_pretrained(target, torch_dtype=torch.float32)
    name, heard = "transformer_blocks.3.ff.net.2", {}
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: heard.update(x=args[0])
    )
    run(model, call)
    handle.remove()

    with torch.no_grad():
        reference, made = (
            model.get_submodule(name)(heard["x"]),
            tool.get_submodule(name)(heard["x"]),
        )
        with simulate(model, plan, graph):
            simulated = model.get_submodule(name)(heard["x"])

    assert torchao_formats(tool, graph) == formats(plan.layers)
    assert noise(made, simulated) < 0.1 * noise(
        simulated, reference
    )  # a scale in fp16 here, in fp32 there: some inputs fall to the other side


@pytest.mark.parametrize(
    ("name", "schemes"),
    [
        (
            "scenes-unet",
            ["int4-g32", "uint4-g32", "int5-g32", "uint5-g32", "int8-g32", "keep", "uint4-g32@hqq"],
        )
    ],
)
def test_gguf_files_load_in_diffusers_and_compute_what_simulate_says(
    name: str, schemes: list[str], folder: Path
) -> None:
    target, plan = exported("gguf", name, schemes, folder)
    model, graph, _, call = full(name)
    from diffusers import GGUFQuantizationConfig

    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    tool = type(model).from_single_file(
        str(target / "model.gguf"),
        config=str(target),
        quantization_config=config,
        torch_dtype=torch.float32,
    )

    kinds = {
        layer.name: getattr(
            getattr(tool.get_submodule(layer.name).weight, "quant_type", None), "name", ""
        )
        for layer in graph
    }
    assert {n: gguf_scheme(kind) for n, kind in kinds.items()} == formats(plan.layers)
    error, damage = compare(tool, model, plan, graph, call)
    assert error < HALF < 1e-5 < damage


def test_rules_for_stable_diffusion_cpp_match_one_tensor_each(folder: Path) -> None:
    import re

    target, plan = exported("gguf", "scenes-unet", ["int4-g32", "keep", "int8-g32"], folder)
    _, _, source, _ = full("scenes-unet")
    from qsearch.measure.shards import Weights

    rules = [
        rule.rpartition("=")
        for rule in (target / "tensor-type-rules.txt").read_text().strip().split(",")
    ]
    names = list(Weights(source / "unet").files)

    assert len(rules) == sum(scheme != KEEP for scheme in plan.layers.values())
    for pattern, _, kind in rules:
        assert kind in ("q4_0", "q8_0")
        assert "=" not in pattern
        [hit] = [name for name in names if re.search(pattern, name)]
        assert plan.layers[hit.removesuffix(".weight")] == Scheme.parse(
            {"q4_0": "int4-g32", "q8_0": "int8-g32"}[kind]
        )


def test_gguf_packs_as_its_own_package_does_where_the_codes_are_the_same() -> None:
    needs("gguf")
    import gguf
    import numpy as np

    from qsearch.execute.codes import Rows
    from qsearch.execute.exporters.gguf import TYPES, pack

    codes = torch.randint(0, 1 << 30, (6, 4, 32))
    for kind, text in TYPES.items():
        scheme = Scheme.parse(text)
        level = (codes % 2**scheme.bits).float() - (
            0 if scheme.family == "uint" else 2 ** (scheme.bits - 1)
        )
        zero = torch.full((6, 4), 3.0) if scheme.family == "uint" else torch.zeros(6, 4)
        scale = torch.rand(6, 4).half().float() + 0.5
        scale = scale.half().float()

        packed = pack(Rows(level, scale, zero), kind).numpy()

        unpacked = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, kind))
        np.testing.assert_allclose(
            unpacked.reshape(6, 4, 32),
            (scale[..., None] * (level - zero[..., None])).numpy(),
            atol=4e-3,
        )


@pytest.mark.slow  # quanto compiles a C++ extension when it is first asked to unpack
def test_quanto_loads_its_weights_and_computes_what_simulate_says(folder: Path) -> None:
    target, plan = exported(
        "quanto",
        "scenes-dit",
        ["uint4-g128", "int8-c", "e4m3-c", "keep", "uint2-c", "e5m2-c"],
        folder,
    )
    model, graph, _, call = full("scenes-dit")
    from optimum.quanto import quantization_map
    from optimum.quanto.models import QuantizedPixArtTransformer2DModel

    tool = QuantizedPixArtTransformer2DModel.from_pretrained(target)._wrapped

    found = quanto_formats(tool, quantization_map(tool))
    assert {layer.name: KEEP for layer in graph} | found == formats(plan.layers)
    error, damage = compare(tool, model, plan, graph, call)
    assert error < EXACT < 1e-4 < damage


@pytest.mark.parametrize(
    ("name", "schemes"),
    [
        (
            "scenes-dit",
            [
                "int4-g32",
                "uint4-c",
                "int8-c",
                "e4m3-c",
                "keep",
                "uint5-g32@hqq",
                "e2m1-g32",
                "e3m2-c",
                "int3-g16",
                "uint6-c",
                "e5m2-c",
                "uint2-g16",
            ],
        ),
        ("scenes-unet", ["int8-c", "uint4-c", "uint4-g32", "e4m3-c", "keep"]),
        (
            "scenes-dit",
            ["int4-c~rotate", "uint4-g32~lowrank16", "uint3-c~rotate16~lowrank32", "int8-c"],
        ),
    ],
)
def test_sdnq_loads_its_weights_and_computes_what_simulate_says(
    name: str, schemes: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "SDNQ_USE_TORCH_COMPILE", "0"
    )  # read while sdnq is imported; compiling takes minutes and changes nothing here
    target, plan = exported("sdnq", name, schemes, folder)
    model, graph, _, call = full(name)
    import sdnq  # noqa: F401  (diffusers asks that it be imported first)

    tool = type(model).from_pretrained(target, torch_dtype=torch.float32)

    assert sdnq_formats(tool, graph) == formats(plan.layers)
    error, damage = compare(tool, model, plan, graph, call)
    assert error < EXACT < 1e-4 < damage


def test_bitsandbytes_replaces_the_layers_of_the_plan_and_no_other(folder: Path) -> None:
    target, plan = exported(
        "bitsandbytes", "scenes-dit", ["int8-c+a8", "int8-c+a8", "keep"], folder
    )
    model, graph, _, _ = full("scenes-dit")
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    config = BitsAndBytesConfig(**json.loads((target / "bitsandbytes.json").read_text()))
    with torch.device("meta"):
        empty = type(model).from_config(model.config)
    tool = replace_with_bnb_linear(empty, config.llm_int8_skip_modules, quantization_config=config)

    found = {
        layer.name: type(tool.get_submodule(layer.name)).__name__ == "Linear8bitLt"
        for layer in graph
    }
    assert found == {name: scheme != KEEP for name, scheme in plan.layers.items()}


def test_bitsandbytes_refuses_two_formats_and_names_that_it_would_confuse(folder: Path) -> None:
    needs("bitsandbytes")
    _, graph, source, _ = full("scenes-dit")
    from qsearch.execute.exporters.bitsandbytes import nearest

    two = Plan.make(
        graph,
        {
            x.name: nearest(Scheme.parse(s), x)
            for x, s in zip(graph, ["int8-c+a8", "int4-c"] * 100, strict=False)
        },
    )
    with pytest.raises(QSearchError, match="one format"):
        export(two, graph, source, "bitsandbytes", folder / "two")

    # The last layer is called proj_out; a block's layer of that name would be skipped with it.
    from qsearch.execute.exporters.bitsandbytes import _skips

    assert _skips("blocks.0.proj_out", ["proj_out"])
    assert not _skips("blocks.10.ff", ["blocks.1.ff"])


def test_a_step_policy_is_valid_for_diffusers_and_rounds_inputs_between_its_ends(
    folder: Path,
) -> None:
    reason = "diffusers 0.40 reads no step policy"
    readers = pytest.importorskip("diffusers.pipelines.cosmos.mixed_precision", reason=reason)
    from qsearch.core.steps import StepRanges

    _, graph, source, _ = full("scenes-dit")
    plan = plan_for("step_policy", graph, ["e4m3-t+ae4m3t", "keep"])
    weights = {name: scheme.weight_only for name, scheme in plan.layers.items()}
    steps = Plan.make(
        graph,
        {
            name: (weights[name], scheme, scheme, weights[name])
            for name, scheme in plan.layers.items()
        },
        steps=StepRanges.equal(4),
    )

    files = export(steps, graph, source, "step_policy", folder / "policy", sampler_steps=20)

    said = json.loads(files[0].read_text())["quantization_config"]
    policy = readers.Cosmos3MixedPrecisionConfig.resolve(None, quantization_config=said)
    assert [policy.use_high_precision(i, 20) for i in range(20)] == [True] * 5 + [False] * 10 + [
        True
    ] * 5
    assert (files[0].parent / "protected_steps.txt").read_text() == "0,1,2,3,4,-5,-4,-3,-2,-1\n"
    mixed = Plan.make(
        graph,
        {name: (KEEP, scheme) for name, scheme in plan.layers.items()},
        steps=StepRanges.equal(2),
    )
    with pytest.raises(QSearchError, match="leaves weights alone"):
        export(mixed, graph, source, "step_policy", folder / "mixed")


def test_a_step_policy_in_nvfp4_reads_back_and_two_formats_are_one_line(folder: Path) -> None:
    from qsearch.execute.exporters import step_policy

    _, graph, source, _ = full("scenes-dit")
    plan = plan_for("step_policy", graph, ["nvfp4+anvfp4", "keep"])
    both = plan_for("step_policy", graph, ["nvfp4+anvfp4", "e4m3-t+ae4m3t"])

    files = export(plan, graph, source, "step_policy", folder / "nvfp4")

    said = json.loads(files[0].read_text())["quantization_config"]
    assert said["quant_algo"] == "NVFP4"
    named = modules(graph)
    kept = {n for n, s in plan.layers.items() if s == KEEP}
    whole = {m for m in named.values() if {n for n in named if named[n] == m} <= kept}
    assert set(said["ignore"]) == kept | whole
    assert step_policy.read(folder / "nvfp4", graph) == plan.layers
    with pytest.raises(QSearchError, match="one algorithm for all layers, FP8 or NVFP4"):
        export(both, graph, source, "step_policy", folder / "both")
    (folder / "nvfp4" / "protected_steps.txt").write_text("0,1\n")
    with pytest.raises(QSearchError, match="protects the steps 0,1"):
        step_policy.read(folder / "nvfp4", graph)


def test_a_step_policy_of_a_u_net_is_one_line_and_no_file(folder: Path) -> None:
    _, graph, source, _ = full("scenes-unet")
    plan = plan_for("step_policy", graph, ["e4m3-t+ae4m3t", "keep"])

    with pytest.raises(QSearchError, match=r"called transformer, the only one .* is unet$"):
        export(plan, graph, source, "step_policy", folder / "u-net")
    assert not (folder / "u-net").exists()
