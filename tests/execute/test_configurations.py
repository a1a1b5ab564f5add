"""Configurations by which a tool quantizes while it loads, of cache-dit and TensorRT-LLM: what they
say reads back, what they can't say is one line before anything is written, and broken files are
errors that teach.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from qsearch import Plan, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.decide.constraints import fused
from qsearch.execute.exporters import cache_dit, tensorrt_llm
from qsearch.execute.exporting import Export
from qsearch.execute.exports import export
from tests.execute.test_tool_files import damage
from tests.execute.tool_models import known, mixed

FP8, NVFP4 = "e4m3-t+ae4m3t", "nvfp4+anvfp4"


def said(path: Path) -> Any:
    """What a configuration holds below its one key."""
    [value] = yaml.safe_load(path.read_text()).values()
    return value


def renamed(job: Export, names: Mapping[str, str], folder: Path) -> Export:
    """The job of a model in which some layers have other names."""
    layers = [replace(x, name=names.get(x.name, x.name)) for x in job.graph]
    graph = OpGraph("renamed", tuple(layers))
    plan = {x.name: job.plan.layers[y.name] for x, y in zip(graph, job.graph, strict=True)}
    place = folder / "model" / "transformer"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    weights = {
        f"{x.name}.weight": job.weights.tensor(f"{y.name}.weight")
        for x, y in zip(graph, job.graph, strict=True)
    }
    save_file(weights, place / "diffusion_pytorch_model.safetensors")
    return Export(Plan.make(graph, plan), graph, place.parent)


# ------------------------------------------------------------------------------------ cache-dit


def test_cache_dits_file_names_every_layer_once_and_no_type_by_default(tmp_path: Path) -> None:
    there = known()
    plan = mixed(there.graph, "cache_dit", ["int8-c", "e4m3-c+ae4m3", "keep", "nvfp4"])

    [path] = cache_dit.write(there.job(plan), tmp_path)

    held = said(path)
    chosen = {n: s for n, s in plan.layers.items() if s != KEEP}
    assert set(held["precision_plan"]) == set(chosen)
    assert {n for n, s in plan.layers.items() if s == KEEP} <= set(held["exclude_layers"])
    assert held["repeated_blocks"] == ["PixArtTransformer2DModel"]
    assert cache_dit.read(tmp_path, there.graph) == plan.layers


def test_a_name_within_another_is_one_line_where_their_schemes_differ(tmp_path: Path) -> None:
    there = known()
    names = [x.name for x in there.graph if x.kind == "linear"]
    job = renamed(
        there.job(mixed(there.graph, "cache_dit", ["int8-c"])),
        {names[-2]: f"{names[-1]}.1.up"},
        tmp_path,
    )
    (tmp_path / "same").mkdir()
    cache_dit.write(job, tmp_path / "same")
    for other, rule in ((KEEP, "no type"), (Scheme.parse("e4m3-c"), "float8_weight_only")):
        plan = job.plan.replaced(job.graph, {names[-1]: other})
        with pytest.raises(QSearchError, match=re.escape(f"{names[-1]}.1.up {rule}")):
            export(plan, job.graph, job.source, "cache_dit", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_cache_dit_has_no_nvfp4_products_for_small_weights_and_no_convolutions() -> None:
    there = known("scenes-unet")
    layer = next(x for x in there.graph if x.kind == "linear" and not x.parts)
    big, flat = replace(layer, weight_shape=(1040, 64)), replace(layer, weight_shape=(64, 2048))
    conv = next(x for x in there.graph if x.kind == "conv2d")

    for shape, wanted in ((layer, "nvfp4"), (big, NVFP4), (flat, "nvfp4"), (conv, "keep")):
        assert str(cache_dit.nearest(Scheme.parse(NVFP4), shape)) == wanted
    assert str(cache_dit.nearest(Scheme.parse("int8-c@gptq"), layer)) == "int8-c"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"quant_type": "float8_per_row"}, "with int8_weight_only by default"),
        ({"repeated_blocks": ["A", "B"]}, "one region, the whole model"),
        ({"regional_quantize": False}, "one region, the whole model"),
        (
            {"precision_plan": {"proj_out": "float8_per_tensor"}},
            "no scheme means float8_per_tensor",
        ),
        ({"precision_plan": {"proj_owt": "int8_per_row"}}, "proj_owt"),
        ({"exclude_layers": None}, "holds no QuantizeConfig"),
    ],
)
def test_another_file_of_cache_dits_is_refused(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    there = known()
    [path] = cache_dit.write(there.job(Plan.uniform(there.graph, "int8-c")), tmp_path)
    path.write_text(yaml.safe_dump({"quantize_config": said(path) | changes}))

    with pytest.raises(QSearchError, match=rule):
        cache_dit.read(tmp_path, there.graph)


# --------------------------------------------------------------------------------- TensorRT-LLM


@pytest.mark.parametrize("scheme", [FP8, NVFP4])
def test_tensorrt_llm_ignores_kept_layers_by_its_own_names_too(scheme: str, tmp_path: Path) -> None:
    there = known()
    kept = {n for names in fused(there.graph) for n in names if ".0.attn1." in n}
    kept |= {"transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2", "proj_out"}
    layers = {
        x.name: KEEP if x.name in kept else tensorrt_llm.nearest(Scheme.parse(scheme), x)
        for x in there.graph
    }
    plan = Plan.make(there.graph, layers)

    [path] = tensorrt_llm.write(there.job(plan), tmp_path)

    held = said(path)
    assert held["quant_algo"] == {FP8: "FP8", NVFP4: "NVFP4"}[scheme]
    assert held["dynamic"] is True
    assert {
        "transformer_blocks.0.attn1.qkv_proj",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.1.ff.up_proj",
        "transformer_blocks.1.ff.down_proj",
        "proj_out",
    } <= set(held["ignore"])
    assert "transformer_blocks.1.attn1.qkv_proj" not in held["ignore"]
    assert tensorrt_llm.read(tmp_path, there.graph) == plan.layers


def test_what_tensorrt_llm_cannot_say_is_one_line(tmp_path: Path) -> None:
    there = known()
    one = mixed(there.graph, "tensorrt_llm", [FP8])
    both = one.replaced(there.graph, {"transformer_blocks.1.ff.net.2": Scheme.parse(NVFP4)})
    part = one.replaced(there.graph, {"transformer_blocks.0.attn1.to_k": KEEP})

    for plan, rule in (
        (both, "quant_config has one algorithm for all layers, FP8 or NVFP4"),
        (part, r"attn1.to_k and \S+attn1.to_q are one layer for the readers of tensorrt_llm"),
    ):
        with pytest.raises(QSearchError, match=rule):
            export(plan, there.graph, there.folder, "tensorrt_llm", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_tensorrt_llm_never_quantizes_embedders_of_what_it_is_given() -> None:
    there = known()
    layer = there.graph.layer("proj_out")
    for name, wanted in {
        "time_text_embed.guidance_embedder.linear_1": "keep",
        "condition_embedder.text_embedder.linear_2": "keep",
        "adaln_single.emb.timestep_embedder.linear_1": "keep",
        "context_embedder": FP8,
        "x_embedder": FP8,
        "condition_embedder.time_proj": FP8,
        "blocks.3.ffn.net.2": FP8,
    }.items():
        assert str(tensorrt_llm.nearest(Scheme.parse(FP8), replace(layer, name=name))) == wanted


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"quant_algo": "FP8_BLOCK_SCALES"}, "holds no quant_config of TensorRT-LLM's"),
        ({"quant_algo": "MIXED_PRECISION"}, "holds no quant_config of TensorRT-LLM's"),
        ({"dynamic": False}, "it holds no weights"),
        ({"ignore": ["proj_owt"]}, "proj_owt"),
        ({"ignore": []}, "TensorRT-LLM has no FP8 for adaln_single.emb.timestep_embedder.linear_1"),
    ],
)
def test_another_file_of_tensorrt_llms_is_refused(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    there = known()
    plan = mixed(there.graph, "tensorrt_llm", [FP8])
    [path] = tensorrt_llm.write(there.job(plan), tmp_path)
    path.write_text(yaml.safe_dump({"quant_config": said(path) | changes}))

    with pytest.raises(QSearchError, match=rule):
        tensorrt_llm.read(tmp_path, there.graph)


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_files_of_tensorrt_llms_are_errors_that_teach(count: int, tmp_path: Path) -> None:
    there, dice, refused = known(), random.Random(0), 0
    [path] = tensorrt_llm.write(there.job(mixed(there.graph, "tensorrt_llm", [FP8])), tmp_path)
    whole = path.read_bytes()
    for i in range(count):
        damage(path, dice, i)
        try:
            assert set(tensorrt_llm.read(tmp_path, there.graph)) == {x.name for x in there.graph}
        except QSearchError as error:
            refused += 1
            assert len(str(error)) < 4000
        path.write_bytes(whole)
    assert refused > count / 10
