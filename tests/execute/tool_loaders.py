"""Exports loaded by the tools that read them, on a CPU: what a tool's own objects say of each
layer, and a call of the denoiser as the tool computes it.

Tools are imported when they are asked for. A loader takes a denoiser and an export's folder.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from qsearch.core.graph import OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporters import cache_dit as cache_dit_exporter
from qsearch.execute.exporters import gguf as gguf_exporter
from qsearch.execute.exporters import modelopt as modelopt_exporter
from qsearch.execute.exporters import sdnq as sdnq_exporter
from qsearch.execute.exporters.quanto import TYPES as QUANTO_TYPES
from qsearch.execute.turned import rotation_word
from qsearch.measure.pipelines import example_inputs, run
from tests.execute.tool_models import Known


class CannotRunError(Exception):
    """What a loader says of a tool that can't load an export, or can't compute with it, here."""


@dataclass(frozen=True)
class Loaded:
    """An export in its tool.

    Attributes:
        output: calls the denoiser with what `Known` recorded.
        formats: layer -> scheme as the tool's own objects say; None where they say nothing.
        model: the denoiser as the tool has it; None where it is a graph.
    """

    output: Callable[[], Tensor]
    formats: dict[str, Scheme] | None = None
    model: Any = None


def half(value: Any) -> Any:
    """Numbers of a call in fp16."""
    if isinstance(value, dict):
        return {k: half(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(half, value))
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value


def in_half(model: nn.Module, there: Known) -> Tensor:
    """The output of a model in fp16."""
    call = replace(there.call, args=half(there.call.args), kwargs=half(there.call.kwargs))
    return run(model, call).float()


def feed(there: Known) -> dict[str, Any]:
    """A call's tensors by name, for graphs."""
    return {
        name: value.numpy()
        for name, value in example_inputs(there.call, there.model).items()
        if isinstance(value, Tensor)
    }


def with_compressed_tensors(there: Known, folder: Path) -> Loaded:
    """compressed-tensors: its compressor takes the packed state, and decompresses."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    kind: Any = type(there.model)
    held = json.loads((folder / "config.json").read_text())
    config = QuantizationConfig.model_validate(held["quantization_config"])
    model = kind.from_config(kind.load_config(folder)).eval()
    apply_quantization_config(model, config, show_progress=False)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    schemes = {
        layer.name: getattr(model.get_submodule(layer.name), "quantization_scheme", None)
        for layer in there.graph
    }
    compressor.decompress_model(model)
    model = model.float()  # the tool's block formats come back in bf16
    formats = {n: KEEP if x is None else compressed_scheme(x) for n, x in schemes.items()}
    return Loaded(lambda: run(model, there.call), formats, model)


def compressed_scheme(found: Any) -> Scheme:
    """What compressed-tensors' own `QuantizationScheme` says."""
    w, x = found.weights, found.input_activations
    sign, size = "int" if w.symmetric else "uint", f"g{w.group_size}" if w.group_size else "c"
    floats = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8", (8, None): "e4m3-c"}
    name = f"{sign}{w.num_bits}-{size}" if w.type == "int" else floats[w.num_bits, w.group_size]
    inputs = "" if x is None else f"+a{'e4m3' if x.type == 'float' else x.num_bits}"
    return Scheme.parse(name + inputs)


def with_autoround(there: Known, folder: Path) -> Loaded:
    """AutoRound's layers in diffusers, in fp16."""
    kind: Any = type(there.model)
    model = kind.from_pretrained(folder, torch_dtype=torch.float16).eval()
    formats = {layer.name: KEEP for layer in there.graph}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]["extra_config"]
    for name, layer in model.named_modules():
        if type(layer).__name__ == "QuantLinear":
            sign = "int" if said[name]["sym"] else "uint"
            width = there.graph.layer(name).weight_shape[1]
            formats[name] = Scheme(f"{sign}{layer.bits}", layer.group_size % width)
    return Loaded(lambda: in_half(model, there), formats, model)


def with_onnx(there: Known, folder: Path) -> Loaded:
    """ONNX Runtime, told to leave the inputs of layers with groups alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    given = feed(there)
    inputs = {i.name: given[i.name] for i in session.get_inputs()}
    return Loaded(lambda: torch.from_numpy(session.run(None, inputs)[0]))


def with_openvino(there: Known, folder: Path) -> Loaded:
    """OpenVINO's plug-in for CPUs, in fp32; the file itself says that inputs stay as they are."""
    import openvino

    rules = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", rules)
    given = feed(there)
    inputs = {i.get_any_name(): given[i.get_any_name()] for i in compiled.inputs}
    return Loaded(lambda: torch.from_numpy(compiled(inputs)[0]))


def with_modelopt(there: Known, folder: Path) -> Loaded:
    """ModelOpt simulates by its list of quantizers."""
    import modelopt.torch.quantization as mtq
    import yaml

    model = copy.deepcopy(there.model)
    said = yaml.safe_load((folder / "quant_cfg.yaml").read_text())
    mtq.quantize(model, said, lambda m: run(m, there.call))
    formats: dict[str, Scheme] = {}
    for layer in there.graph:
        held: Any = getattr(model.get_submodule(layer.name), "weight_quantizer", None)
        names = ("num_bits", "axis", "block_sizes")
        formats[layer.name] = (
            KEEP
            if held is None or not held.is_enabled
            else modelopt_exporter.scheme_of({name: getattr(held, name) for name in names})
        )
    return Loaded(lambda: run(model, there.call), formats, model)


def with_torchao(there: Known, folder: Path) -> Loaded:
    """torchao's tensors in diffusers."""
    kind: Any = type(there.model)
    model = kind.from_pretrained(folder, torch_dtype=torch.float32)
    return Loaded(lambda: run(model, there.call), torchao_formats(model, there.graph), model)


def torchao_formats(model: nn.Module, graph: OpGraph) -> dict[str, Scheme]:
    """What the loaded tensors are, by their own words."""
    found = {}
    for layer in graph:
        weight: Any = model.get_submodule(layer.name).weight
        kind = type(weight.data).__name__ if type(weight) is nn.Parameter else type(weight).__name__
        if kind in ("Parameter", "Tensor"):
            found[layer.name] = KEEP
            continue
        group = 0 if weight.block_size[1] == weight.shape[1] else weight.block_size[1]
        if kind == "Float8Tensor":
            found[layer.name] = Scheme("e4m3", group)
        elif kind == "Int8Tensor":
            inputs = "8" if weight.act_quant_kwargs is not None else ""
            found[layer.name] = Scheme("int8", group, inputs)
        else:
            bits = str(weight.target_dtype).removeprefix("torch.int")
            sign = "uint" if weight.zero_point.any() else "int"
            found[layer.name] = Scheme(f"{sign}{bits}", group)
    return found


def with_cache_dit(there: Known, folder: Path) -> Loaded:
    """cache-dit by its own file: its filters say which layer gets which type, and torchao's tensors
    are made and multiplied on a CPU, where a GPU is only asked for.
    """
    import cache_dit

    module: Any = importlib.import_module("cache_dit.quantization.torchao.quantize_ao")
    config = cache_dit.load_quantize_config(str(folder / cache_dit_exporter.FILE))
    model: Any = copy.deepcopy(there.model)
    if "float8_per_row" in config.precision_plan.values():
        model = model.bfloat16()  # it takes no other type by row
    model._repeated_blocks = config.repeated_blocks
    schemes = {kind: Scheme.parse(text) for text, kind in cache_dit_exporter.TYPES.items()}
    formats, refused = {layer.name: KEEP for layer in there.graph}, []
    own = module._quantize_module

    def quantize(region: nn.Module, made: Any, chosen: Any, **rest: Any) -> None:
        kind = chosen.keywords["override_quant_type"] or chosen.keywords["quant_ctx"].quant_type
        held = [n for n, m in region.named_modules() if chosen(m, n)]
        formats.update(dict.fromkeys(held, schemes[kind]))
        try:
            own(region, made, lambda _, name: name in held, **rest)
        except (AssertionError, ImportError) as error:
            refused.append(f"{kind}: {error}")

    gpu = types.SimpleNamespace(
        device_type="cuda",
        is_accelerator_available=lambda: True,
        get_device_capability=lambda *_: (10, 0),
    )
    with (
        mock.patch.object(module, "current_platform", gpu),
        mock.patch.object(module, "_quantize_module", quantize),
    ):
        cache_dit.quantize(model, quantize_config=config)

    def output() -> Tensor:
        if refused:
            raise CannotRunError("; ".join(refused))
        return run(model, there.call)

    return Loaded(output, formats, model)


def with_gguf(there: Known, folder: Path) -> Loaded:
    """GGUF in diffusers."""
    from diffusers import GGUFQuantizationConfig

    kind: Any = type(there.model)
    if not hasattr(kind, "from_single_file"):
        raise CannotRunError(f"diffusers reads no {kind.__name__} from a single file")
    model = kind.from_single_file(
        str(folder / "model.gguf"),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    formats = {}
    for layer in there.graph:
        held = getattr(model.get_submodule(layer.name).weight, "quant_type", None)
        formats[layer.name] = gguf_scheme(getattr(held, "name", ""))
    return Loaded(lambda: run(model, there.call), formats, model)


def gguf_scheme(kind: str) -> Scheme:
    """The scheme of a type of GGUF's; `keep` for others."""
    return Scheme.parse(gguf_exporter.TYPES.get(kind, "keep"))


def with_gguf_py(there: Known, folder: Path) -> Loaded:
    """GGUF by ggml's own Python package, each tensor dequantized as ComfyUI-GGUF does."""
    kinds, held = read_gguf(folder / "model.gguf")
    return dequantized(there, kinds, held)


def read_gguf(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Types of a file's tensors, and their values in fp32, by gguf-py."""
    import gguf

    kinds, held = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        kinds[tensor.name] = tensor.tensor_type.name
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        held[tensor.name] = torch.from_numpy(values.copy()).float()
    return kinds, held


def dequantized(there: Known, kinds: dict[str, str], held: dict[str, torch.Tensor]) -> Loaded:
    """The denoiser of diffusers with these values; layers have the schemes of these types."""
    model = copy.deepcopy(there.model)
    state = model.state_dict()
    model.load_state_dict({n: held[n].reshape(x.shape) for n, x in state.items()})
    formats = {x.name: gguf_scheme(kinds[f"{x.name}.weight"]) for x in there.graph}
    return Loaded(lambda: run(model, there.call), formats, model)


def with_quanto(there: Known, folder: Path) -> Loaded:
    """optimum-quanto's weights, by its `requantize`."""
    from optimum.quanto import quantization_map, requantize
    from safetensors.torch import load_file

    model = copy.deepcopy(there.model)
    files = sorted(folder.glob("*.safetensors"))
    held = {name: x for file in files for name, x in load_file(file).items()}
    requantize(model, held, json.loads((folder / "quanto_qmap.json").read_text()))
    formats = {layer.name: KEEP for layer in there.graph}
    formats |= quanto_formats(model, quantization_map(model))
    return Loaded(lambda: run(model, there.call), formats, model)


def quanto_formats(model: nn.Module, said: dict[str, Any]) -> dict[str, Scheme]:
    """What quanto's modules say, of the layers that they have."""
    kinds = {kind: form for form, kind in QUANTO_TYPES.items()}
    found = {}
    for name, entry in said.items():
        layer: Any = model.get_submodule(name)
        stays = type(layer.weight.data).__name__ == "Tensor"
        size = layer.weight_group_size or 0
        found[name] = KEEP if stays else Scheme(kinds[entry["weights"]], size)
    return found


def with_sdnq(there: Known, folder: Path) -> Loaded:
    """SDNQ in diffusers, not compiled."""
    import sdnq  # noqa: F401  (diffusers asks that it be imported first)

    kind: Any = type(there.model)
    model = kind.from_pretrained(folder, torch_dtype=torch.float32)
    return Loaded(lambda: run(model, there.call), sdnq_formats(model, there.graph), model)


def sdnq_formats(model: nn.Module, graph: OpGraph) -> dict[str, Scheme]:
    """What SDNQ's modules say, rotation and branch with it."""
    forms, found = {kind: form for form, kind in sdnq_exporter.TYPES.items()}, {}
    for layer in graph:
        module: Any = model.get_submodule(layer.name)
        held = getattr(module, "sdnq_dequantizer", None)
        if held is None:
            found[layer.name] = KEEP
            continue
        words = [rotation_word(held.hadamard_group_size, layer)] if held.use_hadamard else []
        if module.svd_up is not None:
            words.append(f"lowrank{module.svd_up.shape[-1]}")
        plain = Scheme(forms[held.weights_dtype], max(0, held.group_size))
        found[layer.name] = replace(plain, transforms=tuple(words))
    return found


def with_aimet(there: Known, folder: Path) -> Loaded:
    """AIMET's quantized layers, each of the list of encodings, in the denoiser's place of them:
    its tracer does not follow a whole denoiser.
    """
    from aimet_torch import QuantizationSimModel

    said = json.loads((folder / "model.encodings").read_text())
    names = [name.removesuffix(".weight") for name in said["param_encodings"]]
    wide = max(there.model.get_submodule(n).weight.shape[1] for n in names)
    sim = QuantizationSimModel(
        Side(there.model, names), (torch.randn(2, wide), torch.randn(1, wide, 8, 8))
    )
    sim.load_encodings(said, partial=False, strict=False)
    model = copy.deepcopy(there.model)
    formats = {layer.name: KEEP for layer in there.graph}
    for name in names:
        layer: Any = sim.model.get_submodule(name)
        weights, [inputs, *_] = layer.param_quantizers["weight"], [*layer.input_quantizers, None]
        layer.output_quantizers[0] = None  # of the sum that only the tracer saw
        sign = "int" if weights.symmetric else "uint"
        rounded = "+a8t" if inputs is not None and inputs.is_initialized() else ""
        formats[name] = Scheme.parse(f"{sign}{weights.bitwidth}-c{rounded}")
        model.set_submodule(name, layer)
    return Loaded(lambda: run(model, there.call), formats, model)


class Side(nn.Module):
    """Layers of a denoiser under their own names, side by side: AIMET's tracer does not follow a
    whole U-Net.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            place: nn.Module = self
            *path, last = name.split(".")
            for word in path:
                if word not in dict(place.named_children()):
                    place.add_module(word, nn.Module())
                place = place.get_submodule(word)
            place.add_module(last, copy.deepcopy(model.get_submodule(name)))

    def forward(self, rows: Tensor, picture: Tensor) -> Tensor:
        """Every layer's sum, of a batch of rows or of a picture."""
        made = []
        for name in self.names:
            layer: Any = self.get_submodule(name)
            x = (
                rows[:, : layer.in_features]
                if isinstance(layer, nn.Linear)
                else picture[:, : layer.in_channels]
            )
            made.append(layer(x).sum())
        return torch.stack(made).sum()


def with_bitsandbytes(there: Known, folder: Path) -> Loaded:
    """bitsandbytes' layers where diffusers' own replacement puts them, filled and quantized on a
    CPU.
    """
    import bitsandbytes
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    config = BitsAndBytesConfig(**json.loads((folder / "bitsandbytes.json").read_text()))
    eight = config.load_in_8bit
    model: Any = replace_with_bnb_linear(
        copy.deepcopy(there.model), config.llm_int8_skip_modules, quantization_config=config
    )
    formats = {layer.name: KEEP for layer in there.graph}
    own = bitsandbytes.nn.Linear8bitLt if eight else bitsandbytes.nn.Linear4bit
    for name, layer in model.named_modules():
        if not isinstance(layer, own):
            continue
        first: Any = there.model.get_submodule(name)
        if eight:
            layer.weight = bitsandbytes.nn.Int8Params(
                first.weight.data.clone(), requires_grad=False, has_fp16_weights=False
            )
        else:
            layer.weight = bitsandbytes.nn.Params4bit(
                first.weight.data.clone(), requires_grad=False, quant_type="fp4"
            )
        layer.bias = copy.deepcopy(first.bias)
        layer.to("cpu")
        formats[name] = Scheme.parse("int8-c+a8" if eight else "e2m1-g64")
    return Loaded(lambda: run(model, there.call), formats, model)


@contextmanager
def nunchaku_kernels(found: Any) -> Iterator[None]:
    """diffusers' loader of Nunchaku Lite with `found` in the place of its GPU kernels, and without
    its question for a GPU.
    """
    from diffusers.quantizers.nunchaku import nunchaku_quantizer
    from diffusers.utils import import_utils

    module = types.ModuleType("kernels")
    module.get_kernel = lambda *_, **__: found  # type: ignore[attr-defined]
    patches = [
        mock.patch.dict(sys.modules, {"kernels": module}),
        mock.patch("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True),
        mock.patch.object(import_utils, "_kernels_available", True, create=True),
        mock.patch.object(
            nunchaku_quantizer.NunchakuLiteQuantizer, "validate_environment", lambda *_, **__: None
        ),
    ]
    for name in ("diffusers.utils", "diffusers.utils.import_utils"):
        patches.append(mock.patch(f"{name}.is_kernels_available", lambda: True))
        patches.append(mock.patch(f"{name}.is_kernels_version", lambda *_: True))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)
        yield
