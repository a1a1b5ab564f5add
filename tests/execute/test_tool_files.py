"""Files for other tools: what they hold reads back, what a tool lacks becomes the nearest it has, and broken files are errors that teach."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qsearch.core import plugins
from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import BitPlan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporters import aimet, autoround, comfyui, compressed_tensors, modelopt, onnx, openvino
from qsearch.execute.exporting import Export, formats
from qsearch.measure.calibration import LayerInputs
from qsearch.measure.quantization import quantize
from tests.core.test_hostile import mutate_bytes, mutate_tree

MUTATIONS = 60
SHAPES = {"blocks.0.to_q": (64, 64), "blocks.0.ff": (96, 64), "blocks.1.to_q": (64, 64), "blocks.1.ff": (32, 160), "conv": (32, 64, 3, 3), "odd": (7, 24)}
WANTED = ["int4-c", "uint4-g32", "nvfp4", "int8-c+a8", "e4m3-c", "mxfp8", "uint3-c@hqq", "keep", "int2-g16", "e4m3-t", "uint8-c+a8t", "km3-c", "keep+a8"]
#: exporter -> the file that says the plan
SAID = {
    "compressed_tensors": "config.json",
    "autoround": "config.json",
    "modelopt": "quant_cfg.yaml",
    "comfyui": "",
    "aimet": "model.encodings",
}


def needs(name: str) -> None:
    for package in plugins.load("exporters", name).needs:
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            pytest.skip(f"not installed: pip install {package}")


@pytest.fixture
def graph() -> OpGraph:
    """Linear layers with sides that 32 divides and that it doesn't, and a convolution."""
    return OpGraph("small", tuple(LayerSpec(n, "feed-forward-in", "linear" if len(s) == 2 else "conv2d", s, 1) for n, s in SHAPES.items()))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Random weights of those layers."""
    return {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in SHAPES.items()}


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A pipeline's folder with nothing but a transformer."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Small"}))
    save_file({**weights, "odd.bias": torch.zeros(7)}, folder / "diffusion_pytorch_model.safetensors")
    return tmp_path / "pipeline"


def job(name: str, graph: OpGraph, source: Path, first: int = 0) -> Export:
    exporter: Any = plugins.load("exporters", name)
    layers = {x.name: exporter.nearest(Scheme.parse(WANTED[(first + i) % len(WANTED)]), x) for i, x in enumerate(graph)}
    ranges = {x.name: LayerInputs(*(torch.tensor([v]) for v in (-1.0, 2.0, 0.5, 0.1)), torch.zeros(1, 1)) for x in graph}
    return Export(BitPlan.make(graph, layers), graph, source, "transformer", ranges)


@pytest.mark.parametrize("first", range(0, len(WANTED), 3))
@pytest.mark.parametrize("name", SAID)
def test_what_is_written_reads_back_as_the_plan(name: str, first: int, graph: OpGraph, source: Path, tmp_path: Path) -> None:
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
        name: {text: str(plugins.load("exporters", name).nearest(Scheme.parse(text), linear)) for text in ("int4-c", "uint3-c", "km3-c", "nvfp4")}
        for name in (*SAID, "onnx", "openvino")
    }

    assert found == {
        "compressed_tensors": {"int4-c": "int4-c", "uint3-c": "uint3-c", "km3-c": "int3-c", "nvfp4": "nvfp4"},
        "autoround": {"int4-c": "int4-c", "uint3-c": "uint4-c", "km3-c": "int4-c", "nvfp4": "int4-g16"},
        "modelopt": {"int4-c": "int4-c", "uint3-c": "int3-c", "km3-c": "int3-c", "nvfp4": "nvfp4"},
        "comfyui": {"int4-c": "nvfp4", "uint3-c": "nvfp4", "km3-c": "nvfp4", "nvfp4": "nvfp4"},
        "aimet": {"int4-c": "int4-c", "uint3-c": "uint3-c", "km3-c": "int3-c", "nvfp4": "int4-c"},
        "onnx": {"int4-c": "int4-c", "uint3-c": "uint4-c", "km3-c": "int4-c", "nvfp4": "int4-g16"},
        "openvino": {"int4-c": "int4-c", "uint3-c": "uint4-c", "km3-c": "int4-c", "nvfp4": "int4-g16"},
    }


@pytest.mark.parametrize("name", ["compressed_tensors", "autoround", "onnx", "openvino", "aimet"])
def test_fractions_of_zero_points_are_not_cut_off_without_a_word(name: str, graph: OpGraph) -> None:
    found = plugins.load("exporters", name).nearest(Scheme.parse("uint4-c@hqq"), graph.layer("blocks.0.to_q"))

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
        path.write_bytes(mutate_tree(json.dumps(yaml.safe_load(text)), rng) if i % 2 else mutate_bytes(text, rng))
    else:
        path.write_bytes((mutate_tree if i % 2 else mutate_bytes)(path.read_text(), rng))


@pytest.mark.parametrize("count", [MUTATIONS, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SAID)
def test_hostile_files_are_errors_that_teach(name: str, count: int, graph: OpGraph, source: Path, tmp_path: Path) -> None:
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
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file() and source not in p.parents) == sorted(files)


@pytest.mark.parametrize(("bits", "layout"), [("int4-c", "pack-quantized"), ("uint5-g32", "pack-quantized"), ("int8-c+a8", "int-quantized")])
def test_compressed_tensors_config_groups_say_all_that_a_scheme_does(bits: str, layout: str) -> None:
    said = compressed_tensors.entry(Scheme.parse(bits))

    assert said["format"] == layout
    assert str(compressed_tensors.scheme_of(said)) == bits
    with pytest.raises(QSearchError, match="says more than"):
        compressed_tensors.scheme_of({**said, "weights": {**said["weights"], "actorder": "weight"}})


def test_a_layer_that_two_groups_name_is_refused(graph: OpGraph, source: Path, tmp_path: Path) -> None:
    needs("compressed_tensors")
    (tmp_path / "out").mkdir()
    config, *_ = compressed_tensors.write(job("compressed_tensors", graph, source), tmp_path / "out")
    said = json.loads(config.read_text())
    groups = said["quantization_config"]["config_groups"]
    groups["group_1"]["targets"] += groups["group_0"]["targets"]
    config.write_text(json.dumps(said))

    with pytest.raises(QSearchError, match="twice"):
        compressed_tensors.read(tmp_path / "out", graph)


def test_autorounds_words_hold_the_first_code_in_the_lowest_bits(graph: OpGraph, source: Path, weights: dict[str, torch.Tensor]) -> None:
    layer, scheme = graph.layer("blocks.0.ff"), Scheme.parse("uint4-g32")
    plan = BitPlan.make(graph, {x.name: scheme if x is layer else KEEP for x in graph})
    held = autoround.packed(Export(plan, graph, source), layer, weights["blocks.0.ff.weight"])
    code = quantize(weights["blocks.0.ff.weight"], scheme).code

    lowest, highest = held["blocks.0.ff.qweight"][0] & 15, (held["blocks.0.ff.qweight"][0] >> 28) & 15
    assert torch.equal(lowest, code.codes.reshape(96, 64)[:, 0].int())
    assert torch.equal(highest, code.codes.reshape(96, 64)[:, 7].int())
    assert torch.equal(held["blocks.0.ff.qzeros"][:, 0] & 15, code.zero[0, :, 0].int())


def test_modelopts_checkpoint_file_stands_only_where_it_can_say_all(graph: OpGraph, source: Path, tmp_path: Path) -> None:
    for folder, other, expected in (("all", "int8-c", True), ("some", "int3-c", False)):
        (tmp_path / folder).mkdir()
        layers = {x.name: "nvfp4" if x.name == "blocks.0.ff" else other for x in graph}
        modelopt.write(Export(BitPlan.make(graph, layers), graph, source), tmp_path / folder)
        assert (tmp_path / folder / "hf_quant_config.json").is_file() is expected


def test_a_list_that_does_not_switch_everything_off_first_is_refused(graph: OpGraph, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path, *_ = modelopt.write(job("modelopt", graph, source), tmp_path / "out")
    path.write_text(yaml.safe_dump({"quant_cfg": yaml.safe_load(path.read_text())["quant_cfg"][1:]}))

    with pytest.raises(QSearchError, match="switching every quantizer off"):
        modelopt.read(tmp_path / "out", graph)


def test_comfyuis_tiles_are_those_of_the_formula() -> None:
    scales = torch.arange(130 * 6, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(130, 6)
    made = comfyui.tiled(scales).flatten()

    assert len(made) == 256 * 8
    for row, column in ((0, 0), (31, 3), (32, 0), (127, 5), (129, 4)):  # cuBLAS, "1D block scaling factors layout"
        block = (row // 128) * 2 + column // 4
        inner = (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
        assert made[block * 512 + inner] == scales[row, column]


def test_aimets_encodings_are_the_grid_of_the_method(graph: OpGraph, source: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    (tmp_path / "out").mkdir()
    plan = BitPlan.make(graph, {x.name: "uint4-c@search" for x in graph})
    [path] = aimet.write(Export(plan, graph, source), tmp_path / "out")
    entries = json.loads(path.read_text())["param_encodings"]["conv.weight"]
    weight = weights["conv.weight"]
    scale, offset = (torch.tensor([e[k] for e in entries]).view(-1, 1, 1, 1) for k in ("scale", "offset"))

    made = ((weight / scale).round() - offset).clamp(0, 15) + offset  # as AIMET rounds
    torch.testing.assert_close(made * scale, quantize(weight, Scheme.parse("uint4-c@search")).dequantize(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("exporter", [onnx, openvino])
def test_rounding_inputs_needs_calibration(exporter: Any, graph: OpGraph, source: Path) -> None:
    for package in exporter.needs:
        pytest.importorskip(package)
    layer = graph.layer("odd")
    plan = BitPlan.make(graph, {x.name: "int8-c+a8t" if x is layer else "keep" for x in graph})
    given = (Export(plan, graph, source), layer)

    with pytest.raises(QSearchError, match="export with calibration"):
        onnx._Writer(_onnx_graph(graph, {}))._input(*given) if exporter is onnx else openvino._round_input(*given, None)


def _onnx_graph(graph: OpGraph, weights: dict[str, torch.Tensor]) -> Any:
    """A graph in which each linear layer multiplies an input of its own."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs = [], [], []
    for layer in graph:
        name = layer.name
        inputs.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, None))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None))
        if layer.kind == "linear":
            nodes.append(helper.make_node("Transpose", [f"{name}.weight"], [f"{name}.t"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", [f"{name}.x", f"{name}.t"], [f"{name}.y"]))
        else:
            nodes.append(helper.make_node("Conv", [f"{name}.x", f"{name}.weight"], [f"{name}.y"], pads=[1] * 4))
    return helper.make_graph(nodes, "small", inputs, outputs, [numpy_helper.from_array(w.numpy(), n) for n, w in weights.items()])


@pytest.fixture
def onnx_folder(graph: OpGraph, source: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> tuple[Path, BitPlan]:
    """model.onnx of a graph made by hand, and its plan."""
    library = pytest.importorskip("onnx")
    asked = job("onnx", graph, source)
    made = _onnx_graph(graph, weights)
    onnx._Writer(made).write(asked, weights)
    (tmp_path / "onnx").mkdir()
    library.save_model(library.helper.make_model(made, opset_imports=[library.helper.make_opsetid("", 21)], ir_version=10), tmp_path / "onnx" / "model.onnx")
    return tmp_path / "onnx", asked.plan


def test_onnx_graphs_read_back_and_compute_what_codes_stand_for(onnx_folder: tuple[Path, BitPlan], graph: OpGraph, weights: dict[str, torch.Tensor]) -> None:
    from onnx.reference import ReferenceEvaluator

    folder, plan = onnx_folder
    assert onnx.read(folder, graph) == formats(plan.layers)
    x = torch.randn(2, 3, 64)
    evaluator = ReferenceEvaluator(str(folder / "model.onnx"))
    for name in ("blocks.0.to_q", "blocks.0.ff"):
        scheme = plan.layers[name]
        wanted = x @ quantize(weights[f"{name}.weight"], scheme.weight_only).dequantize().T
        feeds = {f"{other}.x": x.numpy() if other == name else torch.randn(1, *_inputs(other)).numpy() for other in SHAPES}
        [made] = evaluator.run([f"{name}.y"], feeds)
        torch.testing.assert_close(torch.from_numpy(made), wanted, rtol=1e-4, atol=1e-4)


def _inputs(name: str) -> tuple[int, ...]:
    shape = SHAPES[name]
    return (shape[1],) if len(shape) == 2 else (shape[1], 4, 4)


def test_onnx_data_beside_the_file_or_nowhere(onnx_folder: tuple[Path, BitPlan], graph: OpGraph) -> None:
    import onnx as library

    folder, _ = onnx_folder
    model = library.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.data_location = library.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value="../../etc/passwd")
    (folder / "model.onnx").write_bytes(model.SerializeToString())  # onnx itself would refuse to save it

    with pytest.raises(QSearchError, match="data lies beside its file"):
        onnx.read(folder, graph)


def test_hostile_onnx_files_are_errors_that_teach(onnx_folder: tuple[Path, BitPlan], graph: OpGraph) -> None:
    folder, _ = onnx_folder
    path, rng, refused = folder / "model.onnx", random.Random(0), 0
    whole = path.read_bytes()
    for _ in range(3 * MUTATIONS):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice((len(data), rng.randrange(1, len(data))))]))
        try:
            assert set(onnx.read(folder, graph)) == set(SHAPES)
        except QSearchError:
            refused += 1
    assert refused > MUTATIONS


@pytest.fixture
def ir(graph: OpGraph, source: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> tuple[Path, BitPlan]:
    """model.xml with each weight alone, and its plan."""
    ov = pytest.importorskip("openvino")
    from qsearch.execute.codes import pieces

    asked = job("openvino", graph, source)
    outputs = []
    for layer in graph:
        scheme = asked.plan.layers[layer.name]
        weight = weights[f"{layer.name}.weight"]
        node = ov.opset15.constant(weight.numpy()) if scheme == KEEP else openvino._constant(layer, scheme, pieces(asked, layer, weight))
        node.set_friendly_name(f"self.model.{layer.name}.weight")
        data = ov.opset15.parameter([-1, *_inputs(layer.name)], name=layer.name)
        user = ov.opset15.matmul(data, node, False, True) if layer.kind == "linear" else ov.opset15.convolution(data, node, [1, 1], [1, 1], [1, 1], [1, 1])
        if scheme.activation:
            openvino._round_input(asked, layer, user)
        outputs.append(user)
    (tmp_path / "ir").mkdir()
    found = [x for user in outputs for x in _parameters(user)]
    ov.save_model(ov.Model(outputs, found, "small"), tmp_path / "ir" / "model.xml", compress_to_fp16=False)
    return tmp_path / "ir", asked.plan


def _parameters(node: Any) -> list[Any]:
    if node.get_type_name() == "Parameter":
        return [node]
    return [x for port in node.inputs() for x in _parameters(port.get_source_output().get_node())]


def test_irs_read_back_as_the_plan(ir: tuple[Path, BitPlan], graph: OpGraph) -> None:
    folder, plan = ir

    assert openvino.read(folder, graph) == formats(plan.layers)


def test_hostile_irs_are_errors_that_teach(ir: tuple[Path, BitPlan], graph: OpGraph) -> None:
    folder, _ = ir
    path, rng, refused = folder / "model.xml", random.Random(0), 0
    whole = path.read_text()
    for i in range(3 * MUTATIONS):
        text = mutate_bytes(whole, rng) if i % 3 else _swapped(whole, rng).encode()
        path.write_bytes(text)
        try:
            assert set(openvino.read(folder, graph)) == set(SHAPES)
        except QSearchError:
            refused += 1
    assert refused > MUTATIONS
    path.write_text('<!DOCTYPE net [<!ENTITY a "x"><!ENTITY b "&a;&a;">]>' + whole)
    with pytest.raises(QSearchError, match="defines entities"):
        openvino.read(folder, graph)


def _swapped(text: str, rng: random.Random) -> str:
    """The text with one attribute's value in the place of another's: still XML."""
    words = text.split('"')
    a, b = (rng.randrange(len(words) // 2) * 2 + 1 for _ in range(2))
    words[a] = words[b]
    return '"'.join(words)
