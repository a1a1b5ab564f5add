"""Graphs for ONNX and OpenVINO, made by hand and small: they read back as the plan, compute what
codes stand for, and are read safely when broken.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP
from qsearch.execute.exporters import onnx, openvino
from qsearch.execute.exporting import Export, formats
from tests.core.test_hostile import mutate_bytes
from tests.execute.tool_files import SHAPES, job

MUTATIONS = 60


@pytest.mark.parametrize("exporter", [onnx, openvino])
def test_rounding_inputs_needs_calibration(exporter: Any, graph: OpGraph, source: Path) -> None:
    for package in exporter.needs:
        pytest.importorskip(package)
    layer = graph.layer("odd")
    plan = Plan.make(graph, {x.name: "int8-c+a8t" if x is layer else "keep" for x in graph})
    given = (Export(plan, graph, source), layer)

    with pytest.raises(QSearchError, match="export with calibration"):
        onnx._Writer(_onnx_graph(graph, {}))._input(
            *given
        ) if exporter is onnx else openvino._round_input(*given, None)


def _onnx_graph(graph: OpGraph, weights: dict[str, torch.Tensor]) -> Any:
    """A graph in which each linear layer multiplies an input of its own."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs, outputs = [], [], []
    for layer in graph:
        name = layer.name
        inputs.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, None))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None))
        if layer.kind == "linear":
            nodes.append(
                helper.make_node("Transpose", [f"{name}.weight"], [f"{name}.t"], perm=[1, 0])
            )
            nodes.append(helper.make_node("MatMul", [f"{name}.x", f"{name}.t"], [f"{name}.y"]))
        else:
            nodes.append(
                helper.make_node(
                    "Conv", [f"{name}.x", f"{name}.weight"], [f"{name}.y"], pads=[1] * 4
                )
            )
    return helper.make_graph(
        nodes,
        "small",
        inputs,
        outputs,
        [numpy_helper.from_array(w.numpy(), n) for n, w in weights.items()],
    )


@pytest.fixture
def onnx_folder(
    graph: OpGraph, source: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> tuple[Path, Plan]:
    """model.onnx of a graph made by hand, and its plan."""
    library = pytest.importorskip("onnx")
    asked = job("onnx", graph, source)
    made = _onnx_graph(graph, weights)
    onnx._Writer(made).write(asked, weights)
    (tmp_path / "onnx").mkdir()
    library.save_model(
        library.helper.make_model(
            made, opset_imports=[library.helper.make_opsetid("", 21)], ir_version=10
        ),
        tmp_path / "onnx" / "model.onnx",
    )
    return tmp_path / "onnx", asked.plan


def test_onnx_graphs_read_back_and_compute_what_codes_stand_for(
    onnx_folder: tuple[Path, Plan], graph: OpGraph, weights: dict[str, torch.Tensor]
) -> None:
    from onnx.reference import ReferenceEvaluator

    folder, plan = onnx_folder
    assert onnx.read(folder, graph) == formats(plan.layers)
    x = torch.randn(2, 3, 64)
    evaluator = ReferenceEvaluator(str(folder / "model.onnx"))
    for name in ("blocks.0.to_q", "blocks.0.ff"):
        scheme = plan.layers[name]
        wanted = x @ quantize(weights[f"{name}.weight"], scheme.weight_only).dequantize().T
        feeds = {
            f"{other}.x": x.numpy() if other == name else torch.randn(1, *_inputs(other)).numpy()
            for other in SHAPES
        }
        [made] = evaluator.run([f"{name}.y"], feeds)
        torch.testing.assert_close(torch.from_numpy(made), wanted, rtol=1e-4, atol=1e-4)


def _inputs(name: str) -> tuple[int, ...]:
    shape = SHAPES[name]
    return (shape[1],) if len(shape) == 2 else (shape[1], 4, 4)


def test_onnx_data_beside_the_file_or_nowhere(
    onnx_folder: tuple[Path, Plan], graph: OpGraph
) -> None:
    import onnx as library

    folder, _ = onnx_folder
    model = library.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.data_location = library.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value="../../etc/passwd")
    (folder / "model.onnx").write_bytes(
        model.SerializeToString()
    )  # onnx itself would refuse to save it

    with pytest.raises(QSearchError, match="data lies beside its file"):
        onnx.read(folder, graph)


def test_hostile_onnx_files_are_errors_that_teach(
    onnx_folder: tuple[Path, Plan], graph: OpGraph
) -> None:
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
def ir(
    graph: OpGraph, source: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> tuple[Path, Plan]:
    """model.xml with each weight alone, and its plan."""
    ov = pytest.importorskip("openvino")
    from qsearch.execute.codes import pieces

    asked = job("openvino", graph, source)
    outputs = []
    for layer in graph:
        scheme = asked.plan.layers[layer.name]
        weight = weights[f"{layer.name}.weight"]
        node = (
            ov.opset15.constant(weight.numpy())
            if scheme == KEEP
            else openvino._constant(layer, scheme, pieces(asked, layer, weight))
        )
        node.set_friendly_name(f"self.model.{layer.name}.weight")
        data = ov.opset15.parameter([-1, *_inputs(layer.name)], name=layer.name)
        user = (
            ov.opset15.matmul(data, node, False, True)
            if layer.kind == "linear"
            else ov.opset15.convolution(data, node, [1, 1], [1, 1], [1, 1], [1, 1])
        )
        if scheme.activation:
            openvino._round_input(asked, layer, user)
        outputs.append(user)
    (tmp_path / "ir").mkdir()
    found = [x for user in outputs for x in _parameters(user)]
    ov.save_model(
        ov.Model(outputs, found, "small"), tmp_path / "ir" / "model.xml", compress_to_fp16=False
    )
    return tmp_path / "ir", asked.plan


def _parameters(node: Any) -> list[Any]:
    if node.get_type_name() == "Parameter":
        return [node]
    return [x for port in node.inputs() for x in _parameters(port.get_source_output().get_node())]


def test_irs_read_back_as_the_plan(ir: tuple[Path, Plan], graph: OpGraph) -> None:
    folder, plan = ir

    assert openvino.read(folder, graph) == formats(plan.layers)


def test_hostile_irs_are_errors_that_teach(ir: tuple[Path, Plan], graph: OpGraph) -> None:
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
