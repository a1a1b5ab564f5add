"""ONNX: weights as integers or e4m3 with a DequantizeLinear each (opset 21), inputs between
QuantizeLinear and DequantizeLinear where a plan says so.

The denoiser is exported with torch at the shapes of one call of its own pipeline, parameter names
kept; then every planned weight is exchanged for its codes, and what used it reads the dequantized
tensor of the same name. Groups lie in rows (`block_size`), a convolution's behind a Reshape, and
the parts of a long skip behind a Concat. Inputs are rounded per tensor with static ranges, all that
QuantizeLinear can say.

ONNX Runtime rounds the inputs of layers with groups to 8 bits on a CPU, whatever the file says,
unless the session is opened with `session.qdq_matmulnbits_accuracy_level` = 1: a session's option,
which no file can hold.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import key
from ..codes import Rows, pieces
from ..exporting import Export
from ..nearest import nearest_node
from ..tracing import traced

if TYPE_CHECKING:
    from torch import Tensor

needs = ("onnx", "onnxscript")
writes_weights = True
fuses = False
has_steps = False
loading = """
import onnxruntime
from huggingface_hub import snapshot_download

session = onnxruntime.InferenceSession(snapshot_download("{repository}") + "/model.onnx")
"""
takes: tuple[str, ...] = ("denoiser",)
OPSET = 21
FILE = "model.onnx"
#: format -> ONNX's name of its type
TYPES = {"int4": "INT4", "uint4": "UINT4", "int8": "INT8", "uint8": "UINT8", "e4m3": "FLOAT8E4M3FN"}
_LARGEST = 2**30  # bytes in one protobuf message; it can hold twice that


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """What standard nodes can say."""
    return nearest_node(scheme, layer)


def write(job: Export, folder: Path) -> list[Path]:
    """model.onnx, its large tensors beside it in model.onnx.data where they are too large for one
    file.
    """
    import onnx
    import torch

    model, inputs = traced(job)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        program = torch.onnx.export(
            model,
            (),
            kwargs=inputs,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    made = program.model_proto
    _idle_squeezes(made.graph)
    _Writer(made.graph).write(job, {name: p.detach() for name, p in model.named_parameters()})
    large = sum(len(t.raw_data) for t in made.graph.initializer) > _LARGEST
    onnx.save_model(made, folder / FILE, save_as_external_data=large, location=f"{FILE}.data")
    onnx.checker.check_model(folder / FILE)
    return sorted(folder.iterdir())


def _idle_squeezes(graph: Any) -> None:
    """Squeezing an axis longer than one does nothing in torch (PixArt does it), and is an error in
    ONNX: such nodes hand on what they get.
    """
    from onnx import numpy_helper

    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*graph.value_info, *graph.input]
    }
    held = {t.name: t for t in graph.initializer}
    held |= {
        node.output[0]: a.t
        for node in graph.node
        if node.op_type == "Constant"
        for a in node.attribute
        if a.name == "value"
    }
    for node in graph.node:
        if (
            node.op_type == "Squeeze"
            and len(node.input) == 2
            and node.input[1] in held
            and node.input[0] in shapes
        ):
            axes = numpy_helper.to_array(held[node.input[1]]).ravel().tolist()
            if all(shapes[node.input[0]][axis] > 1 for axis in axes):
                node.op_type = "Identity"
                del node.input[1:]


class _Writer:
    """Exchanges weights in an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.initializers = {t.name: t for t in graph.initializer}
        self.nodes: list[Any] = []

    def write(self, job: Export, weights: dict[str, Tensor]) -> None:
        for layer in job.graph:
            scheme = job.plan.layers[layer.name]
            if scheme.format == "keep":
                continue
            if key(layer) not in self.initializers:
                raise QSearchError(
                    f"torch exported the model without {key(layer)}: {layer.name} is not "
                    "run by its pipeline's call; keep it"
                )
            self._weight(layer, scheme, pieces(job, layer, weights[key(layer)]))
            if scheme.activation:
                self._input(job, layer)
        held = list(self.graph.node)
        del self.graph.node[:]
        self.graph.node.extend([*self.nodes, *held])

    def _weight(self, layer: LayerSpec, scheme: Scheme, parts: list[Rows]) -> None:
        from onnx import helper

        name = key(layer)
        self.graph.initializer.remove(self.initializers[name])
        outs = [name] if len(parts) == 1 else [f"{name}.part{i}" for i in range(len(parts))]
        splits = layer.parts if len(parts) > 1 else (layer.weight_shape[1],)
        for out, part, channels in zip(outs, parts, splits, strict=True):
            shape = (layer.weight_shape[0], channels, *layer.weight_shape[2:])
            flat = (shape[0], math.prod(shape[1:]))
            blocked, plain = scheme.group > 0, len(shape) == 2
            axis = {"axis": 1, "block_size": scheme.group} if blocked else {"axis": 0}
            named = [f"{out}.codes", f"{out}.scale"]
            self._tensor(named[0], TYPES[scheme.format], flat if blocked else shape, part.level)
            self._tensor(
                named[1], "FLOAT", tuple(part.scale.shape) if blocked else (shape[0],), part.scale
            )
            if scheme.family == "uint":
                named.append(f"{out}.zero")
                self._tensor(
                    named[2],
                    TYPES[scheme.format],
                    tuple(part.zero.shape) if blocked else (shape[0],),
                    part.zero,
                )
            rows = f"{out}.rows" if blocked and not plain else out
            self.nodes.append(
                helper.make_node("DequantizeLinear", named, [rows], f"{out}.dequantize", **axis)
            )
            if rows != out:
                self._tensor(f"{out}.shape", "INT64", (len(shape),), shape)
                self.nodes.append(
                    helper.make_node("Reshape", [rows, f"{out}.shape"], [out], f"{out}.reshape")
                )
        if len(outs) > 1:
            self.nodes.append(helper.make_node("Concat", outs, [name], f"{name}.concat", axis=1))

    def _input(self, job: Export, layer: LayerSpec) -> None:
        from onnx import helper

        from ...choices.codes import qparams_from_range

        seen = job.calibration.get(layer.name)
        if seen is None:
            raise QSearchError(
                f"{job.plan.layers[layer.name]} needs the range of what goes into "
                f"{layer.name}; export with calibration"
            )
        scale, zero = qparams_from_range(seen.low.min(), seen.high.max(), Scheme("uint8"))
        names = [f"{layer.name}.input.scale", f"{layer.name}.input.zero"]
        self._tensor(names[0], "FLOAT", (), scale)
        self._tensor(names[1], "UINT8", (), zero)
        for i, node in enumerate(consumers(self.graph, key(layer))):
            at = f"{layer.name}.input{i}"
            quantize = helper.make_node(
                "QuantizeLinear", [node.input[0], *names], [f"{at}.codes"], f"{at}.quantize"
            )
            dequantize = helper.make_node(
                "DequantizeLinear", [f"{at}.codes", *names], [f"{at}.rounded"], f"{at}.dequantize"
            )
            node.input[0] = f"{at}.rounded"
            position = list(self.graph.node).index(node)
            for offset, made in enumerate((quantize, dequantize)):
                self.graph.node.insert(position + offset, made)

    def _tensor(self, name: str, kind: str, shape: tuple[int, ...], values: Any) -> None:
        import numpy as np
        import torch
        from onnx import TensorProto, helper

        flat = torch.as_tensor(values).flatten()
        if kind.endswith("INT4"):
            code = flat.to(torch.int16) & 15
            code = torch.nn.functional.pad(code, (0, len(code) % 2))
            raw = (code[::2] | (code[1::2] << 4)).to(torch.uint8).numpy().tobytes()
        elif kind == "FLOAT8E4M3FN":
            raw = flat.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
        else:
            raw = (
                flat.numpy()
                .astype(
                    {"FLOAT": np.float32, "INT64": np.int64, "INT8": np.int8, "UINT8": np.uint8}[
                        kind
                    ]
                )
                .tobytes()
            )
        self.graph.initializer.append(
            helper.make_tensor(name, getattr(TensorProto, kind), shape, raw, raw=True)
        )


def consumers(graph: Any, name: str) -> list[Any]:
    """The products that a weight goes into, past a Transpose."""
    found = []
    for node in graph.node:
        if name in node.input:
            found += consumers(graph, node.output[0]) if node.op_type == "Transpose" else [node]
    return found


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """Types and blocks of the weights, and the nodes before the products they go into, from the
    graph alone: no tensor's data is read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        held = onnx.load(folder / FILE, load_external_data=False).graph
    except (OSError, DecodeError, ValueError) as error:
        raise ArtifactError(
            f"{folder / FILE} is not readable as ONNX ({type(error).__name__}: {error}); "
            "export again"
        ) from error
    for tensor in held.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and (
                Path(entry.value).name != entry.value or entry.value in ("", ".", "..")
            ):
                raise ArtifactError(
                    f"{folder / FILE}: data lies beside its file; {tensor.name} reads it "
                    f"from {entry.value!r}"
                )
    return _Reader(held, folder).read(graph)


class _Reader:
    """Schemes from an ONNX graph."""

    def __init__(self, graph: Any, folder: Path) -> None:
        self.graph, self.folder = graph, folder
        self.initializers = {t.name: t for t in graph.initializer}
        self.makers = {out: node for node in graph.node for out in node.output}

    def read(self, graph: OpGraph) -> dict[str, Scheme]:
        made = {layer.name: self._layer(layer) for layer in graph}
        known = {key(layer) for layer in graph}
        for node in self.graph.node:
            if (
                node.op_type == "DequantizeLinear"
                and node.input
                and node.input[0] in self.initializers
            ):
                owner = node.input[0].removesuffix(".codes").rpartition(".part")[0] or node.input[
                    0
                ].removesuffix(".codes")
                if owner not in known:
                    raise QSearchError(
                        f"{self.folder / FILE} quantizes {owner}, which is no layer of "
                        f"{graph.model}"
                    )
        return made

    def _layer(self, layer: LayerSpec) -> Scheme:
        name = key(layer)
        if name in self.initializers:
            if tuple(self.initializers[name].dims) != layer.weight_shape:
                raise QSearchError(
                    f"{self.folder / FILE}: {name} is "
                    f"{tuple(self.initializers[name].dims)}, the graph says "
                    f"{layer.weight_shape}"
                )
            return KEEP
        last = self.makers.get(name)
        if last is None:
            if not layer.quantizable:  # a weight that this call does not run is left out by torch
                return KEEP
            raise QSearchError(
                f"{self.folder / FILE} has no {name}, which the graph needs; export the "
                "model of this graph"
            )
        parts = list(last.input) if last.op_type == "Concat" else [name]
        found = {self._part(part, layer) for part in parts}
        if len(found) != 1:
            raise QSearchError(
                f"{self.folder / FILE}: the parts of {name} differ: "
                f"{', '.join(map(str, sorted(found)))}"
            )
        scheme = found.pop()
        rounded = [self._rounded(node) for node in consumers(self.graph, name)]
        if any(rounded) and not all(rounded):
            raise QSearchError(
                f"{self.folder / FILE} rounds the input of {layer.name} in one place and "
                "not in another"
            )
        return Scheme.parse(f"{scheme}+a8t") if any(rounded) else scheme

    def _part(self, name: str, layer: LayerSpec) -> Scheme:
        from onnx import TensorProto

        node = self.makers.get(name)
        if node is not None and node.op_type == "Reshape" and node.input:
            node = self.makers.get(node.input[0])
        tensor = (
            self.initializers.get(node.input[0])
            if node is not None and node.op_type == "DequantizeLinear" and node.input
            else None
        )
        if node is None or tensor is None:
            raise QSearchError(
                f"{self.folder / FILE}: {name} must be a weight, or a DequantizeLinear of "
                "one; it is made otherwise"
            )
        kinds = {getattr(TensorProto, kind): form for form, kind in TYPES.items()}
        said = {a.name: a.i for a in node.attribute}
        if tensor.data_type not in kinds or math.prod(tensor.dims) > layer.weights:
            raise QSearchError(
                f"{self.folder / FILE}: {tensor.name} has type {tensor.data_type} and "
                f"dims {list(tensor.dims)}; export again"
            )
        block = said.get("block_size", 0)
        return Scheme.parse(f"{kinds[tensor.data_type]}-{f'g{block}' if block else 'c'}")

    def _rounded(self, node: Any) -> bool:
        before = self.makers.get(node.input[0]) if node.input else None
        if before is None or before.op_type != "DequantizeLinear" or not before.input:
            return False
        first = self.makers.get(before.input[0])
        return first is not None and first.op_type == "QuantizeLinear"
