"""OpenVINO: an IR whose weights are compressed constants (4 or 8 bits, converted, moved and scaled
where they are used), as NNCF writes them.

The denoiser is converted by OpenVINO itself, which keeps parameter names; then each planned
constant is exchanged for codes with their zero points and scales, in the pattern that its plugins
recognise and multiply from. NNCF would choose scales of its own, for one or two widths a call; here
the codes are those of the plan's methods. Inputs are rounded by FakeQuantize with static ranges;
the CPU's plug-in would round those of compressed layers to 8 bits as well, which the IR turns off.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import key
from ..codes import Rows, pieces
from ..exporting import Export
from ..nearest import nearest_node
from ..tracing import Positional, traced

if TYPE_CHECKING:
    from torch import Tensor, nn

needs = ("openvino",)
writes_weights = True
fuses = False
has_steps = False
loading = """
import openvino
from huggingface_hub import snapshot_download

folder = snapshot_download("{repository}")
compiled = openvino.Core().compile_model(folder + "/model.xml", "CPU")
"""
takes: tuple[str, ...] = ("denoiser",)
FILE = "model.xml"
#: format -> OpenVINO's name of its type
TYPES = {"int4": "i4", "uint4": "u4", "int8": "i8", "uint8": "u8", "e4m3": "f8e4m3"}
#: place in the IR of the plug-in's own option: it rounds inputs of compressed layers in groups,
#: unless it is 0
_INPUTS_AS_THEY_ARE = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
_PREFIX = "self.model."  # the name of the wrapped model in OpenVINO's names


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """What standard nodes can say."""
    return nearest_node(scheme, layer)


def converted(model: nn.Module, inputs: dict[str, Any]) -> tuple[Positional, Any]:
    """The model with its arguments in order, and OpenVINO's of it, converted from one call."""
    import openvino as ov

    wrapped = Positional(model, inputs).eval()
    with warnings.catch_warnings():
        # torch's tracer warns of every branch that this call decides
        warnings.simplefilter("ignore")
        return wrapped, ov.convert_model(wrapped, example_input=tuple(wrapped.tensors.values()))


def write(job: Export, folder: Path) -> list[Path]:
    """model.xml and model.bin."""
    import openvino as ov

    model, inputs = traced(job)
    wrapped, made = converted(model, inputs)
    for port, name in zip(made.inputs, wrapped.names, strict=True):
        port.get_tensor().set_names({name})
    constants = {
        node.get_friendly_name(): node
        for node in made.get_ops()
        if node.get_type_name() == "Constant"
    }
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for layer in job.graph:
        scheme = job.plan.layers[layer.name]
        if scheme.format == "keep":
            continue
        held = constants.get(_PREFIX + key(layer))
        if held is None:
            raise QSearchError(
                f"OpenVINO converted the model without {key(layer)}: {layer.name} is not "
                "run by its pipeline's call; keep it"
            )
        users = list(held.output(0).get_target_inputs())
        new = _constant(layer, scheme, pieces(job, layer, weights[key(layer)]))
        for user in users:
            user.replace_source_output(new.output(0))
            if scheme.activation:
                _round_input(job, layer, user.get_node())
        held.set_friendly_name(f"{key(layer)}.exchanged")
        new.set_friendly_name(_PREFIX + key(layer))
    made.validate_nodes_and_infer_types()
    made.set_rt_info("0", _INPUTS_AS_THEY_ARE)
    ov.save_model(made, folder / FILE, compress_to_fp16=False)
    return sorted(folder.iterdir())


def _constant(layer: LayerSpec, scheme: Scheme, parts: list[Rows]) -> Any:
    """A node that makes the weight from codes."""
    import numpy as np
    from openvino import opset15 as ops

    splits = layer.parts if len(parts) > 1 else (layer.weight_shape[1],)
    made = []
    for part, channels in zip(parts, splits, strict=True):
        shape = (layer.weight_shape[0], channels, *layer.weight_shape[2:])
        blocked = scheme.group > 0
        dims = (shape[0], math.prod(shape[1:]) // scheme.group, scheme.group) if blocked else shape
        ends = (shape[0], dims[1], 1) if blocked else (shape[0], *[1] * (len(shape) - 1))
        node = ops.convert(_stored(TYPES[scheme.format], dims, part.level), np.float32)
        if scheme.family == "uint":
            node = ops.subtract(
                node, ops.convert(_stored(TYPES[scheme.format], ends, part.zero), np.float32)
            )
        node = ops.multiply(node, ops.constant(part.scale.reshape(ends).numpy()))
        made.append(
            ops.reshape(node, ops.constant(np.array(shape, np.int64)), special_zero=False)
            if blocked
            else node
        )
    return ops.concat(made, 1) if len(made) > 1 else made[0]


def _stored(kind: str, shape: tuple[int, ...], values: Tensor) -> Any:
    """A constant of a type that NumPy may lack."""
    import numpy as np
    import openvino as ov
    import torch

    flat = values.flatten()
    if kind.endswith("4"):
        code = flat.to(torch.int16) & 15
        code = torch.nn.functional.pad(code, (0, len(code) % 2))
        raw = (code[::2] | (code[1::2] << 4)).to(torch.uint8)
    elif kind == "f8e4m3":
        raw = flat.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        raw = flat.to(torch.int8).view(torch.uint8) if kind == "i8" else flat.to(torch.uint8)
    held = ov.Tensor(
        getattr(ov.Type, kind), ov.Shape(shape)
    )  # owns its memory; one around an array of ours would outlive it
    held.data.view(np.uint8).reshape(-1)[:] = raw.numpy()
    return ov.op.Constant(held)


def _round_input(job: Export, layer: LayerSpec, user: Any) -> None:
    import numpy as np
    from openvino import opset15 as ops

    from ...choices.codes import qparams_from_range

    seen = job.calibration.get(layer.name)
    if seen is None:
        raise QSearchError(
            f"{job.plan.layers[layer.name]} needs the range of what goes into "
            f"{layer.name}; export with calibration"
        )
    scale, zero = qparams_from_range(seen.low.min(), seen.high.max(), Scheme("uint8"))
    low, high = (ops.constant(np.float32(float((end - zero) * scale))) for end in (0, 255))
    rounded = ops.fake_quantize(user.input(0).get_source_output(), low, high, low, high, 256)
    user.input(0).replace_source_output(rounded.output(0))


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """Types and shapes of the constants that make each weight, from model.xml alone."""
    try:
        text = (folder / FILE).read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ArtifactError(f"{folder / FILE} defines entities, which no IR does; export again")
        net = _Net(ElementTree.fromstring(text), folder)
    except (OSError, ElementTree.ParseError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{folder / FILE} is not readable as an OpenVINO IR ({type(error).__name__}: "
            f"{error}); export again"
        ) from error
    return net.read(graph)


class _Net:
    """An IR as layers and what feeds their ports."""

    def __init__(self, root: Any, folder: Path) -> None:
        self.folder = folder
        self.layers = {layer.attrib["id"]: layer for layer in root.findall("./layers/layer")}
        self.sources = {
            (e.attrib["to-layer"], e.attrib["to-port"]): e.attrib["from-layer"]
            for e in root.findall("./edges/edge")
        }
        self.named = {layer.attrib["name"]: layer for layer in self.layers.values()}
        self.size = (folder / FILE).with_suffix(".bin").stat().st_size
        for layer in self.layers.values():
            data = layer.find("data")
            if (
                layer.attrib["type"] == "Const"
                and data is not None
                and int(data.attrib["offset"]) + int(data.attrib["size"]) > self.size
            ):
                raise ValueError(f"{layer.attrib['name']} lies beyond the end of model.bin")

    def before(self, layer: Any, port: int) -> Any:
        """What feeds a port; None where nothing does."""
        return self.layers.get(self.sources.get((layer.attrib["id"], str(port)), ""))

    def read(self, graph: OpGraph) -> dict[str, Scheme]:
        known = {_PREFIX + key(layer) for layer in graph}
        made = {layer.name: self.layer(layer) for layer in graph}
        for name, layer in self.named.items():
            if name.startswith(_PREFIX) and layer.attrib["type"] != "Const" and name not in known:
                raise QSearchError(
                    f"{self.folder / FILE} compresses {name.removeprefix(_PREFIX)}, which "
                    f"is no layer of {graph.model}"
                )
        return made

    def layer(self, layer: LayerSpec) -> Scheme:
        last = self.named.get(_PREFIX + key(layer))
        if last is None:
            if not layer.quantizable:  # a weight that this call does not run is left out
                return KEEP
            raise QSearchError(
                f"{self.folder / FILE} has no {key(layer)}, which the graph needs; export "
                "the model of this graph"
            )
        if last.attrib["type"] == "Const":
            return KEEP
        count = len(last.findall("./input/port")) if last.attrib["type"] == "Concat" else 0
        found = {self._part(self.before(last, i), layer) for i in range(count)} or {
            self._part(last, layer)
        }
        if len(found) != 1:
            raise QSearchError(
                f"{self.folder / FILE}: the parts of {key(layer)} differ: "
                f"{', '.join(map(str, sorted(found)))}"
            )
        scheme = found.pop()
        return Scheme.parse(f"{scheme}+a8t") if self._rounded(last) else scheme

    def _part(self, node: Any, layer: LayerSpec) -> Scheme:
        blocked = node is not None and node.attrib["type"] == "Reshape"
        chain = []
        while node is not None and node.attrib["type"] in (
            "Reshape",
            "Multiply",
            "Subtract",
            "Convert",
        ):
            chain.append(node.attrib["type"])
            node = self.before(node, 0)
        data = node.find("data") if node is not None and node.attrib["type"] == "Const" else None
        forms = {kind: form for form, kind in TYPES.items()}
        if data is None or data.attrib.get("element_type") not in forms or "Multiply" not in chain:
            raise QSearchError(
                f"{self.folder / FILE}: {key(layer)} must be a constant, or codes that "
                "are converted and scaled; it is made otherwise"
            )
        try:
            dims = [int(n) for n in data.attrib["shape"].split(",")]
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder / FILE}: a constant of {key(layer)} has no shape "
                f"({error}); export again"
            ) from error
        if math.prod(dims) > layer.weights or (blocked and len(dims) != 3):
            raise QSearchError(
                f"{self.folder / FILE}: the codes of {key(layer)} are {dims}, the graph "
                f"says {layer.weight_shape}"
            )
        return Scheme.parse(
            f"{forms[data.attrib['element_type']]}-{f'g{dims[-1]}' if blocked else 'c'}"
        )

    def _rounded(self, weight: Any) -> bool:
        users = [
            self.layers[to]
            for (to, port), source in self.sources.items()
            if source == weight.attrib["id"] and port != "0" and to in self.layers
        ]
        before = [self.before(user, 0) for user in users]
        return bool(before) and all(
            node is not None and node.attrib["type"] == "FakeQuantize" for node in before
        )
