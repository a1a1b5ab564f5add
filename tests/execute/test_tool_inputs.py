"""What tools do to inputs that a plan leaves alone: tried with an outlier channel, which any
rounding of inputs would show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.execute.codes import pieces
from qsearch.execute.exporters import onnx, openvino
from qsearch.execute.exporting import Export
from tests.execute.test_tool_graphs import _onnx_graph

ROWS = 24


def with_outlier(width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    dice = np.random.default_rng(0)
    x = dice.standard_normal((ROWS, width)).astype(np.float32)
    x[:, 3] *= 60
    return x


def share(made: Any, wanted: Any, full: Any) -> float:
    """How far a tool lies from what its file says, as a share of what quantization changes."""
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted - full))


def planned(graph: OpGraph, source: Path, scheme: str) -> tuple[Export, str]:
    """A job of one linear layer alone."""
    layer = next(x for x in graph if x.kind == "linear" and x.weight_shape[1] % 32 == 0)
    alone = replace(graph, layers=(layer,), ops=(), edges=(), blocks=(), header=None)
    return Export(Plan.make(alone, {layer.name: scheme}), alone, source), layer.name


@pytest.mark.parametrize("scheme", ["int8-c", "int8-g32"])
def test_openvino_s_plugin_is_told_to_leave_inputs_alone(
    scheme: str,
    graph: OpGraph,
    source: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    ov = pytest.importorskip("openvino")
    job, name = planned(graph, source, scheme)
    layer, weight = job.graph.layer(name), weights[f"{name}.weight"]
    node = openvino._constant(layer, job.plan.layers[name], pieces(job, layer, weight))
    x = with_outlier(weight.shape[1])
    data = ov.opset15.parameter([-1, weight.shape[1]], np.float32, name="x")
    model = ov.Model([ov.opset15.matmul(data, node, False, True)], [data], "one")
    [rows] = pieces(job, layer, weight)
    coded = ((rows.level - rows.zero[..., None]) * rows.scale[..., None]).reshape(weight.shape)
    wanted, full = x @ coded.numpy().T, x @ weight.numpy().T

    def run(file: Path) -> Any:
        core = ov.Core()
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(core.read_model(file), "CPU", hint)(x)[0]

    ov.save_model(model, tmp_path / "plain.xml", compress_to_fp16=False)
    model.set_rt_info("0", openvino._INPUTS_AS_THEY_ARE)
    ov.save_model(model, tmp_path / "told.xml", compress_to_fp16=False)

    assert share(run(tmp_path / "told.xml"), wanted, full) < 0.02
    # The fault itself: where the plug-in stops rounding by itself, the option can go.
    plain = share(run(tmp_path / "plain.xml"), wanted, full)
    assert plain >= share(run(tmp_path / "told.xml"), wanted, full)


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-g32"])
def test_onnx_runtime_leaves_inputs_alone_where_its_session_asks_for_it(
    scheme: str, graph: OpGraph, source: Path, weights: dict[str, torch.Tensor]
) -> None:
    library = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    job, name = planned(graph, source, scheme)
    held = {f"{name}.weight": weights[f"{name}.weight"]}
    made = _onnx_graph(job.graph, held)
    onnx._Writer(made).write(job, held)
    opset = [library.helper.make_opsetid("", 21)]
    model = library.helper.make_model(made, opset_imports=opset, ir_version=10)
    weight = weights[f"{name}.weight"]
    x = with_outlier(weight.shape[1])
    [rows] = pieces(job, job.graph.layer(name), weight)
    coded = ((rows.level - rows.zero[..., None]) * rows.scale[..., None]).reshape(weight.shape)
    wanted, full = x @ coded.numpy().T, x @ weight.numpy().T
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    found = session.run([f"{name}.y"], {f"{name}.x": x})

    assert share(found[0], wanted, full) < 0.02
