"""The tools themselves load what was exported, on a CPU: formats read back from the loaded model,
and outputs against `simulate`.

`off` is the distance to `simulate` as a share of what quantization itself changes; each tool's
bound is what its own arithmetic costs.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporters import (
    aimet,
    autoround,
    comfyui,
    compressed_tensors,
    modelopt,
    onnx,
    openvino,
)
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import example_inputs, run
from qsearch.measure.simulation import simulate
from tests.execute.tool_models import known, mixed, off

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def tool(name: str) -> Any:
    """A tool that is too large to be wanted of everybody who develops, or a skip that says what to
    install.
    """
    module, _, package = name.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "raiseExceptions", False)
        return pytest.importorskip(module, reason=f"not installed: pip install {package or module}")


def test_compressed_tensors_loads_every_layout_and_computes_as_simulated(tmp_path: Path) -> None:
    tool("compressed_tensors compressed-tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from diffusers import PixArtTransformer2DModel
    from safetensors.torch import load_file

    there = known()
    wanted = [
        "int4-c",
        "uint4-g32",
        "uint3-c",
        "int8-c+a8",
        "e4m3-c",
        "e4m3-c+ae4m3",
        "nvfp4",
        "mxfp4",
        "mxfp8",
        "int5-g16+a8",
        "uint2-g16",
        "uint6-c",
        "keep",
    ]
    plan = mixed(there.graph, "compressed_tensors", wanted)
    compressed_tensors.write(there.job(plan), tmp_path)

    model = PixArtTransformer2DModel.from_config(
        PixArtTransformer2DModel.load_config(tmp_path)
    ).eval()
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    apply_quantization_config(model, config, show_progress=False)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    loaded = {
        name: getattr(model.get_submodule(name), "quantization_scheme", None)
        for name in plan.layers
    }
    compressor.decompress_model(model)
    model = model.float()  # the tool's block formats come back in bf16

    assert {name: KEEP if x is None else _scheme(x) for name, x in loaded.items()} == plan.layers
    with simulate(there.model, plan, there.graph):
        for name, scheme in plan.layers.items():
            error = {"nvfp4": 4e-3}.get(scheme.format, 2e-6)  # nvfp4 is multiplied out in bf16
            weight = there.model.get_submodule(name).weight
            torch.testing.assert_close(
                model.get_submodule(name).weight,
                weight,
                rtol=error,
                atol=error * float(weight.abs().max()),
            )
    assert (
        off(run(model, there.call), there.simulated(plan), there.output) < 0.1
    )  # inputs are rounded after others that moved a little


def _scheme(found: Any) -> Scheme:
    """What the tool's own objects say."""
    w, x = found.weights, found.input_activations
    sign, size = "int" if w.symmetric else "uint", f"g{w.group_size}" if w.group_size else "c"
    floats = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8", (8, None): "e4m3-c"}
    name = f"{sign}{w.num_bits}-{size}" if w.type == "int" else floats[w.num_bits, w.group_size]
    return Scheme.parse(
        name if x is None else f"{name}+a{'e4m3' if x.type == 'float' else x.num_bits}"
    )


def test_autoround_loads_every_layer_in_diffusers_and_computes_as_simulated(tmp_path: Path) -> None:
    tool("auto_round auto-round")
    from diffusers import PixArtTransformer2DModel

    there = known()
    plan = mixed(
        there.graph,
        "autoround",
        ["int4-c", "uint4-g32", "int8-c", "uint8-c", "int2-g16", "uint2-g16", "keep", "int4-g80"],
    )
    autoround.write(there.job(plan), tmp_path)

    model = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float16).eval()
    packed = {name: m for name, m in model.named_modules() if type(m).__name__ == "QuantLinear"}

    assert set(packed) == {name for name, scheme in plan.layers.items() if scheme != KEEP}
    for name, layer in packed.items():
        width = there.graph.layer(name).weight_shape[1]
        assert (layer.bits, layer.group_size % width) == (
            plan.layers[name].bits,
            plan.layers[name].group,
        ), name
    made = run(
        model, replace(there.call, args=_half(there.call.args), kwargs=_half(there.call.kwargs))
    )
    assert off(made, there.simulated(plan), there.output) < 0.03  # it computes in fp16


def _half(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _half(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_half, value))
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value


def _feed(there: Any) -> dict[str, Any]:
    return {
        name: value.numpy()
        for name, value in example_inputs(there.call, there.model).items()
        if isinstance(value, Tensor)
    }


QDQ = [
    "int4-c",
    "uint4-g32",
    "int8-c",
    "uint8-c",
    "e4m3-c",
    "int4-g16",
    "uint4-c",
    "keep",
    "uint8-g64",
    "int8-c+a8t",
    "uint4-g32+a8t",
]


def test_onnxruntime_loads_convolutions_and_long_skips_and_computes_as_simulated(
    tmp_path: Path,
) -> None:
    runtime = tool("onnxruntime")
    tool("onnxscript")
    there = known("scenes-unet")
    plan = mixed(there.graph, "onnx", QDQ)
    calibration = calibrate(there.model, there.graph, [there.call], moments=False)
    assert (
        len({str(plan.layers[layer.name]) for layer in there.graph if layer.kind == "conv2d"}) > 5
    )
    assert any(layer.parts and plan.layers[layer.name] != KEEP for layer in there.graph)

    onnx.write(there.job(plan, calibration), tmp_path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    feed = _feed(there)
    made = torch.from_numpy(
        session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]
    )

    assert onnx.read(tmp_path, there.graph) == plan.layers
    assert (
        off(made, there.simulated(plan, calibration), there.output) < 0.05
    )  # products of 8-bit inputs and weights are fused, and rounded elsewhere


@pytest.mark.slow
def test_openvino_loads_convolutions_and_long_skips_and_computes_as_simulated(
    tmp_path: Path,
) -> None:
    ov = tool("openvino")
    there = known("scenes-unet")
    plan = mixed(there.graph, "openvino", QDQ)
    calibration = calibrate(there.model, there.graph, [there.call], moments=False)

    openvino.write(there.job(plan, calibration), tmp_path)
    core, feed, wanted = ov.Core(), _feed(there), there.simulated(plan, calibration)
    for exact, bound in (
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, 0.02),
        ({}, 0.3),
    ):  # by default the CPU rounds inputs to 8 bits as it likes
        compiled = core.compile_model(
            str(tmp_path / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **exact}
        )
        made = torch.from_numpy(
            compiled({i.get_any_name(): feed[i.get_any_name()] for i in compiled.inputs})[0]
        )
        assert off(made, wanted, there.output) < bound
    assert openvino.read(tmp_path, there.graph) == plan.layers
    kept = {
        op.get_friendly_name(): str(op.get_output_element_type(0))
        for op in core.read_model(str(tmp_path / "model.xml")).get_ops()
    }
    assert kept[
        f"self.model.{next(n for n, s in plan.layers.items() if s == KEEP)}.weight"
    ].endswith("'float32'>")


@pytest.mark.slow
def test_modelopt_takes_the_list_and_computes_as_simulated(tmp_path: Path) -> None:
    tool("modelopt nvidia-modelopt")
    import copy

    import modelopt.torch.quantization as mtq

    there = known("scenes-unet")
    on_a_cpu = [
        "int4-c",
        "int4-g32",
        "int8-c",
        "e4m3-c",
        "int2-g16",
        "e4m3-t",
        "keep",
        "int4-g64",
        "int8-t",
        "int3-c",
    ]  # its block formats want CUDA
    plan = mixed(there.graph, "modelopt", on_a_cpu)
    modelopt.write(there.job(plan), tmp_path)

    model = copy.deepcopy(there.model)
    mtq.quantize(
        model,
        yaml.safe_load((tmp_path / "quant_cfg.yaml").read_text()),
        lambda m: run(m, there.call),
    )

    found = {}
    for name in plan.layers:
        held = getattr(model.get_submodule(name), "weight_quantizer", None)
        off_ = held is None or not held.is_enabled
        found[name] = (
            KEEP
            if off_
            else modelopt.scheme_of(
                {"num_bits": held.num_bits, "axis": held.axis, "block_sizes": held.block_sizes}
            )
        )
    assert found == plan.layers
    # Its scales are fp32, ours fp16: at 8 bits that moves the outermost levels by up to 0.06 of a
    # step. Measured: 0.056.
    assert off(run(model, there.call), there.simulated(plan), there.output) < 0.1


COMFY = (
    "e4m3-t",
    "int8-c",
    "nvfp4",
    "mxfp8",
    "int8-t",
    "keep",
    "int8-c+a8",
    "int8-c+a8~rotate",
    "int4-c+a4~rotate",
    "uint4-g64",
    "int8-c~rotate",
)


def test_comfyuis_own_kernels_read_every_weight_as_simulated(tmp_path: Path) -> None:
    tool("comfy_kitchen comfy-kitchen")
    from comfy_kitchen.backends import eager
    from safetensors.torch import load_file

    there = known()
    plan = mixed(there.graph, "comfyui", list(COMFY))
    [path] = comfyui.write(there.job(plan), tmp_path)
    held, said = load_file(path), comfyui.markers(tmp_path)
    assert {str(replace(s, method="")) for s in plan.layers.values()} >= set(COMFY[:-1])

    def weight_of(name: str, kind: str) -> torch.Tensor:
        weight, scale = held[f"{name}.weight"], held.get(f"{name}.weight_scale")
        entry = said.get(name, {"format": "none"})
        group = entry.get("convrot_groupsize")
        match entry["format"]:
            case "nvfp4":
                unit = held[f"{name}.weight_scale_2"]
                return eager.dequantize_nvfp4(weight, unit, scale, torch.float32)
            case "mxfp8":
                eights = scale.view(torch.float8_e8m0fnu)
                return eager.dequantize_mxfp8(weight, eights, torch.float32)
            case "float8_e4m3fn":
                return eager.dequantize_per_tensor_fp8(weight, scale, torch.float32)
            case "convrot_w4a4":
                return eager.dequantize_convrot_w4a4_weight(weight, scale, group)
            case "awq_w4a16":
                ones = torch.eye(weight.shape[1] * 2)
                zeros = held[f"{name}.weight_zeros"]
                return eager.gemv_awq_w4a16(ones, weight, scale, zeros).mT
            case "int8_tensorwise" if entry.get("convrot"):
                return eager.dequantize_int8_convrot_weight(weight, scale, group)
            case "int8_tensorwise":
                return eager.dequantize_int8_simple(weight, scale)
        return weight.float()

    with simulate(there.model, plan, there.graph):
        for name in plan.layers:
            ours = there.model.get_submodule(name).weight.data
            turned = "convrot_groupsize" in said.get(name, {})
            theirs = weight_of(name, said.get(name, {}).get("format", ""))
            near = 1e-6 * float(ours.abs().max()) if turned else 0.0  # two rotations in fp32
            if said.get(name, {}).get("format") == "awq_w4a16":  # its zero points are fp16
                near = 2**-8 * float(held[f"{name}.weight_scale"].max())
            torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=near)


@pytest.mark.parametrize("scheme", ["int8-c+a8", "int8-c", "int8-c+a8~rotate", "int4-c+a4~rotate"])
def test_comfyuis_own_products_do_to_inputs_with_outliers_what_the_scheme_says(
    scheme: str, tmp_path: Path
) -> None:
    tool("comfy_kitchen comfy-kitchen")
    from comfy_kitchen.backends import eager
    from safetensors.torch import load_file

    there = known()
    plan = mixed(there.graph, "comfyui", [scheme])
    [path] = comfyui.write(there.job(plan), tmp_path)
    held, said = load_file(path), comfyui.markers(tmp_path)
    name = next(n for n, s in plan.layers.items() if str(s) == scheme)
    layer = there.model.get_submodule(name)
    x = torch.randn(32, layer.in_features, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 40  # an outlier channel
    exact = layer(x)
    with simulate(there.model, plan, there.graph):
        ours = layer(x)
    weight, scale = held[f"{name}.weight"], held[f"{name}.weight_scale"]
    entry = said[name]
    group = entry.get("convrot_groupsize", 256)
    bias = None if layer.bias is None else layer.bias.data
    if entry.get("full_precision_matrix_mult"):  # ComfyUI dequantizes, and multiplies as ever
        made = x @ eager.dequantize_int8_simple(weight, scale).mT
        theirs = made if bias is None else made + bias
    elif entry["format"] == "convrot_w4a4":
        theirs = eager.convrot_w4a4_linear(x, weight, scale, bias, group)
    else:
        turned = bool(entry.get("convrot"))
        theirs = eager.int8_linear(x, weight, scale, bias, torch.float32, turned, group)

    # ComfyUI rounds about 0, we between the smallest and the largest: errors of the same size, not
    # the same errors.
    whole, apart = float((exact - ours).norm()), float((exact - theirs).norm())
    if "+a" not in scheme:
        assert float((ours - theirs).norm()) < 1e-3 * whole
    else:
        assert 0.7 < apart / whole < 1.5


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


@pytest.mark.slow
def test_aimet_reads_the_encodings_and_rounds_as_simulated(tmp_path: Path) -> None:
    tool("aimet_torch aimet-torch")
    from aimet_torch import QuantizationSimModel

    there = known("scenes-unet")
    plan = mixed(there.graph, "aimet", ["int8-c", "uint4-c", "int4-c", "keep", "uint8-c", "int3-c"])
    [path] = aimet.write(there.job(plan), tmp_path)
    names = [
        n
        for n, s in plan.layers.items()
        if s != KEEP and isinstance(there.model.get_submodule(n), nn.Linear | nn.Conv2d)
    ]
    wide = max(there.model.get_submodule(n).weight.shape[1] for n in names)

    sim = QuantizationSimModel(
        Side(there.model, names), (torch.randn(2, wide), torch.randn(1, wide, 8, 8))
    )
    sim.load_encodings(json.loads(path.read_text()), strict=False)

    assert len({plan.layers[n] for n in names}) == 5
    with simulate(there.model, plan, there.graph), torch.no_grad():
        for name in names:
            layer = sim.model.get_submodule(name)
            quantizer = layer.param_quantizers["weight"]
            assert (quantizer.bitwidth, quantizer.symmetric) == (
                plan.layers[name].bits,
                plan.layers[name].family == "int",
            ), name
            own, made, expected = (
                layer.weight,
                quantizer(layer.weight).dequantize(),
                there.model.get_submodule(name).weight,
            )
            assert (
                float((made - expected).square().sum() / (expected - own).square().sum()) < 0.02
            ), name  # ties may fall to either side
