"""The tools themselves load what was exported, on a CPU: formats read back from the loaded model,
and outputs against `simulate`.

`off` is the distance to `simulate` as a share of what quantization itself changes; each tool's
bound is what its own arithmetic costs.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsearch.core.scheme import KEEP
from qsearch.execute.exporters import (
    aimet,
    autoround,
    cache_dit,
    comfyui,
    compressed_tensors,
    modelopt,
    onnx,
    openvino,
)
from qsearch.measure.calibration import calibrate
from qsearch.measure.simulation import simulate
from tests.execute.layout_loaders import kitchen_weight
from tests.execute.tool_loaders import (
    Side,
    feed,
    with_autoround,
    with_cache_dit,
    with_compressed_tensors,
    with_modelopt,
    with_onnx,
)
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

    loaded = with_compressed_tensors(there, tmp_path)

    assert loaded.formats == plan.layers
    with simulate(there.model, plan, there.graph):
        for name, scheme in plan.layers.items():
            error = {"nvfp4": 4e-3}.get(scheme.format, 2e-6)  # nvfp4 is multiplied out in bf16
            weight = there.model.get_submodule(name).weight
            torch.testing.assert_close(
                loaded.model.get_submodule(name).weight,
                weight,
                rtol=error,
                atol=error * float(weight.abs().max()),
            )
    assert (
        off(loaded.output(), there.simulated(plan), there.output) < 0.1
    )  # inputs are rounded after others that moved a little


def test_autoround_loads_every_layer_in_diffusers_and_computes_as_simulated(tmp_path: Path) -> None:
    tool("auto_round auto-round")
    there = known()
    plan = mixed(
        there.graph,
        "autoround",
        ["int4-c", "uint4-g32", "int8-c", "uint8-c", "int2-g16", "uint2-g16", "keep", "int4-g80"],
    )
    autoround.write(there.job(plan), tmp_path)

    loaded = with_autoround(there, tmp_path)

    assert loaded.formats == plan.layers
    assert off(loaded.output(), there.simulated(plan), there.output) < 0.03  # it computes in fp16


@pytest.mark.parametrize("name", ["scenes-dit", "scenes-unet"])
def test_cache_dit_gives_every_layer_its_type_and_rounds_as_much_as_simulated(
    name: str, tmp_path: Path
) -> None:
    tool("cache_dit cache-dit")
    there = known(name)
    wanted = ["int8-c", "e4m3-c", "keep", "int8-c+aint8", "nvfp4"]
    plan = mixed(there.graph, "cache_dit", wanted)
    cache_dit.write(there.job(plan), tmp_path)

    loaded = with_cache_dit(there, tmp_path)

    assert {str(s) for s in plan.layers.values()} == {*wanted}
    assert loaded.formats == cache_dit.read(tmp_path, there.graph) == plan.layers
    made, wanted_output = loaded.output(), there.simulated(plan)
    assert off(made, wanted_output, there.output) < 0.5  # its int8 has 255 steps, ours has 254
    error = (made - there.output).norm() / (wanted_output - there.output).norm()
    assert 0.7 < error < 1.4


def test_cache_dit_reads_types_that_want_a_gpu_and_their_order_as_the_exporter_does(
    tmp_path: Path,
) -> None:
    tool("cache_dit cache-dit")
    there = known()
    wanted = ["uint4-g32", "e4m3-c+ae4m3", "int8-c", "keep"]
    plan = mixed(there.graph, "cache_dit", wanted)
    cache_dit.write(there.job(plan), tmp_path)

    loaded = with_cache_dit(there, tmp_path)

    assert {str(s) for s in plan.layers.values()} == {*wanted}
    assert loaded.formats == plan.layers


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
    tool("onnxruntime")
    tool("onnxscript")
    there = known("scenes-unet")
    plan = mixed(there.graph, "onnx", QDQ)
    calibration = calibrate(there.model, there.graph, [there.call], moments=False)
    assert (
        len({str(plan.layers[layer.name]) for layer in there.graph if layer.kind == "conv2d"}) > 5
    )
    assert any(layer.parts and plan.layers[layer.name] != KEEP for layer in there.graph)

    onnx.write(there.job(plan, calibration), tmp_path)
    made = with_onnx(there, tmp_path).output()

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
    core, given, wanted = ov.Core(), feed(there), there.simulated(plan, calibration)
    for exact, bound in (
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, 0.02),
        ({}, 0.3),
    ):  # by default the CPU rounds inputs to 8 bits as it likes
        compiled = core.compile_model(
            str(tmp_path / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **exact}
        )
        made = torch.from_numpy(
            compiled({i.get_any_name(): given[i.get_any_name()] for i in compiled.inputs})[0]
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

    loaded = with_modelopt(there, tmp_path)

    assert loaded.formats == plan.layers
    # Its scales are fp32, ours fp16: at 8 bits that moves the outermost levels by up to 0.06 of a
    # step. Measured: 0.056.
    assert off(loaded.output(), there.simulated(plan), there.output) < 0.1


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
    from safetensors.torch import load_file

    there = known()
    plan = mixed(there.graph, "comfyui", list(COMFY))
    [path] = comfyui.write(there.job(plan), tmp_path)
    held, said = load_file(path), comfyui.markers(tmp_path)
    assert {str(replace(s, method="")) for s in plan.layers.values()} >= set(COMFY[:-1])

    with simulate(there.model, plan, there.graph):
        for name in plan.layers:
            ours = there.model.get_submodule(name).weight.data
            entry = said.get(name, {"format": "none"})
            turned = "convrot_groupsize" in entry
            theirs = kitchen_weight(held, name, entry)
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
