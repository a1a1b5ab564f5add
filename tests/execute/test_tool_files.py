"""Files for other tools: what they hold reads back, what a tool lacks becomes the nearest it has,
and broken files are errors that teach.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qsearch.choices.quantization import quantize
from qsearch.core import plugins
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute import comfyui_layout
from qsearch.execute.exporters import aimet, autoround, compressed_tensors, modelopt
from qsearch.execute.exporting import Export, formats
from tests.core.test_hostile import mutate_bytes, mutate_tree
from tests.execute.tool_files import SHAPES, WANTED, job

MUTATIONS = 60
#: exporter -> the file that says the plan
SAID = {
    "compressed_tensors": "config.json",
    "autoround": "config.json",
    "modelopt": "quant_cfg.yaml",
    "comfyui": "",
    "aimet": "model.encodings",
    "cache_dit": "cache_dit.yaml",
}


def needs(name: str) -> None:
    for package in plugins.load("exporters", name).needs:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            pytest.skip(f"not installed: pip install {package}")


@pytest.mark.parametrize("first", range(0, len(WANTED), 3))
@pytest.mark.parametrize("name", SAID)
def test_what_is_written_reads_back_as_the_plan(
    name: str, first: int, graph: OpGraph, source: Path, tmp_path: Path
) -> None:
    needs(name)
    exporter: Any = plugins.load("exporters", name)
    asked = job(name, graph, source, first)
    (tmp_path / "out").mkdir()

    files = exporter.write(asked, tmp_path / "out")

    assert all(path.is_file() for path in files)
    assert exporter.read(tmp_path / "out", graph) == formats(asked.plan.layers)
    assert any(scheme != KEEP for scheme in asked.plan.layers.values())


def test_every_tool_keeps_precision_where_it_lacks_a_scheme(graph: OpGraph) -> None:
    linear = graph.layer("blocks.0.to_q")
    found = {
        name: {
            text: str(plugins.load("exporters", name).nearest(Scheme.parse(text), linear))
            for text in ("int4-c", "uint3-c", "km3-c", "nvfp4")
        }
        for name in (*SAID, "onnx", "openvino")
    }

    assert found == {
        "compressed_tensors": {
            "int4-c": "int4-c",
            "uint3-c": "uint3-c",
            "km3-c": "int3-c",
            "nvfp4": "nvfp4",
        },
        "autoround": {
            "int4-c": "int4-c",
            "uint3-c": "uint4-c",
            "km3-c": "int4-c",
            "nvfp4": "int4-g16",
        },
        "modelopt": {"int4-c": "int4-c", "uint3-c": "int3-c", "km3-c": "int3-c", "nvfp4": "nvfp4"},
        "comfyui": {
            "int4-c": "uint4-g64",
            "uint3-c": "uint4-g64",
            "km3-c": "uint4-g64",
            "nvfp4": "nvfp4",
        },
        "aimet": {"int4-c": "int4-c", "uint3-c": "uint3-c", "km3-c": "int3-c", "nvfp4": "int4-c"},
        "cache_dit": {
            "int4-c": "uint4-g32",
            "uint3-c": "uint4-g32",
            "km3-c": "uint4-g32",
            "nvfp4": "nvfp4",
        },
        "onnx": {"int4-c": "int4-c", "uint3-c": "uint4-c", "km3-c": "int4-c", "nvfp4": "int4-g16"},
        "openvino": {
            "int4-c": "int4-c",
            "uint3-c": "uint4-c",
            "km3-c": "int4-c",
            "nvfp4": "int4-g16",
        },
    }


@pytest.mark.parametrize("name", ["compressed_tensors", "autoround", "onnx", "openvino", "aimet"])
def test_fractions_of_zero_points_are_not_cut_off_without_a_word(name: str, graph: OpGraph) -> None:
    found = plugins.load("exporters", name).nearest(
        Scheme.parse("uint4-c@hqq"), graph.layer("blocks.0.to_q")
    )

    assert str(found) == "uint4-c"


def damage(path: Path, rng: random.Random, i: int) -> None:
    """A file whose text, or whose header, says something else than it did."""
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        head = (mutate_tree if i % 2 else mutate_bytes)(data[8 : 8 + length].decode(), rng)
        path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    elif path.suffix == ".yaml":
        text = path.read_text()
        path.write_bytes(
            mutate_tree(json.dumps(yaml.safe_load(text)), rng) if i % 2 else mutate_bytes(text, rng)
        )
    else:
        path.write_bytes((mutate_tree if i % 2 else mutate_bytes)(path.read_text(), rng))


@pytest.mark.parametrize("count", [MUTATIONS, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SAID)
def test_hostile_files_are_errors_that_teach(
    name: str, count: int, graph: OpGraph, source: Path, tmp_path: Path
) -> None:
    needs(name)
    exporter: Any = plugins.load("exporters", name)
    folder = tmp_path / "out"
    folder.mkdir()
    files = exporter.write(job(name, graph, source), folder)
    whole, rng, refused = {path: path.read_bytes() for path in files}, random.Random(0), 0
    for i in range(count):
        path = rng.choice(files)
        damage(path, rng, i)
        try:
            assert set(exporter.read(folder, graph)) == set(SHAPES)
        except QSearchError as error:
            refused += 1
            assert len(str(error)) < 4000
        path.write_bytes(whole[path])
    assert refused > count / 10
    assert sorted(
        p for p in tmp_path.rglob("*") if p.is_file() and source not in p.parents
    ) == sorted(files)


@pytest.mark.parametrize(
    ("bits", "layout"),
    [("int4-c", "pack-quantized"), ("uint5-g32", "pack-quantized"), ("int8-c+a8", "int-quantized")],
)
def test_compressed_tensors_config_groups_say_all_that_a_scheme_does(
    bits: str, layout: str
) -> None:
    said = compressed_tensors.entry(Scheme.parse(bits))

    assert said["format"] == layout
    assert str(compressed_tensors.scheme_of(said)) == bits
    with pytest.raises(QSearchError, match="says more than"):
        compressed_tensors.scheme_of({**said, "weights": {**said["weights"], "actorder": "weight"}})


def test_a_layer_that_two_groups_name_is_refused(
    graph: OpGraph, source: Path, tmp_path: Path
) -> None:
    needs("compressed_tensors")
    (tmp_path / "out").mkdir()
    config, *_ = compressed_tensors.write(
        job("compressed_tensors", graph, source), tmp_path / "out"
    )
    said = json.loads(config.read_text())
    groups = said["quantization_config"]["config_groups"]
    groups["group_1"]["targets"] += groups["group_0"]["targets"]
    config.write_text(json.dumps(said))

    with pytest.raises(QSearchError, match="twice"):
        compressed_tensors.read(tmp_path / "out", graph)


def test_autorounds_words_hold_the_first_code_in_the_lowest_bits(
    graph: OpGraph, source: Path, weights: dict[str, torch.Tensor]
) -> None:
    layer, scheme = graph.layer("blocks.0.ff"), Scheme.parse("uint4-g32")
    plan = Plan.make(graph, {x.name: scheme if x is layer else KEEP for x in graph})
    held = autoround.packed(Export(plan, graph, source), layer, weights["blocks.0.ff.weight"])
    code = quantize(weights["blocks.0.ff.weight"], scheme).code

    lowest, highest = (
        held["blocks.0.ff.qweight"][0] & 15,
        (held["blocks.0.ff.qweight"][0] >> 28) & 15,
    )
    assert torch.equal(lowest, code.codes.reshape(96, 64)[:, 0].int())
    assert torch.equal(highest, code.codes.reshape(96, 64)[:, 7].int())
    assert torch.equal(held["blocks.0.ff.qzeros"][:, 0] & 15, code.zero[0, :, 0].int())


def test_modelopts_checkpoint_file_stands_only_where_it_can_say_all(
    graph: OpGraph, source: Path, tmp_path: Path
) -> None:
    for folder, other, expected in (("all", "int8-c", True), ("some", "int3-c", False)):
        (tmp_path / folder).mkdir()
        layers = {x.name: "nvfp4" if x.name == "blocks.0.ff" else other for x in graph}
        modelopt.write(Export(Plan.make(graph, layers), graph, source), tmp_path / folder)
        assert (tmp_path / folder / "hf_quant_config.json").is_file() is expected


def test_a_list_that_does_not_switch_everything_off_first_is_refused(
    graph: OpGraph, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    path, *_ = modelopt.write(job("modelopt", graph, source), tmp_path / "out")
    path.write_text(
        yaml.safe_dump({"quant_cfg": yaml.safe_load(path.read_text())["quant_cfg"][1:]})
    )

    with pytest.raises(QSearchError, match="switching every quantizer off"):
        modelopt.read(tmp_path / "out", graph)


def test_comfyuis_tiles_are_those_of_the_formula() -> None:
    scales = torch.arange(130 * 6, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(130, 6)
    made = comfyui_layout.tiled(scales).flatten()

    assert len(made) == 256 * 8
    for row, column in (
        (0, 0),
        (31, 3),
        (32, 0),
        (127, 5),
        (129, 4),
    ):  # cuBLAS, "1D block scaling factors layout"
        block = (row // 128) * 2 + column // 4
        inner = (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
        assert made[block * 512 + inner] == scales[row, column]


def test_aimets_encodings_are_the_grid_of_the_method(
    graph: OpGraph, source: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    (tmp_path / "out").mkdir()
    plan = Plan.make(graph, {x.name: "uint4-c@search" for x in graph})
    [path] = aimet.write(Export(plan, graph, source), tmp_path / "out")
    entries = json.loads(path.read_text())["param_encodings"]["conv.weight"]
    weight = weights["conv.weight"]
    scale, offset = (
        torch.tensor([e[k] for e in entries]).view(-1, 1, 1, 1) for k in ("scale", "offset")
    )

    made = ((weight / scale).round() - offset).clamp(0, 15) + offset  # as AIMET rounds
    torch.testing.assert_close(
        made * scale,
        quantize(weight, Scheme.parse("uint4-c@search")).dequantize(),
        rtol=1e-6,
        atol=1e-7,
    )
