"""Exports to tools: each tool loads a zoo denoiser with a plan that mixes its formats, on a CPU,
and its output is compared with `simulate`.

    python notebooks/figures/tools.py [--tools compressed_tensors onnx …] [--models scenes-dit
    scenes-unet]

A row a tool and model: formats in the plan, layers whose format read back from the files equals the
plan, bytes of the files, `off`: the distance of the tool's output to that of `simulate`, as a share
of the distance between `simulate` and full precision (what quantization itself changes), and that
in dB. Tools that can't run here are left out with a reason. Rows of an earlier call are kept.
Writes tools.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figure import publish

from qsearch.core import plugins
from qsearch.core.scheme import KEEP
from qsearch.execute.exporting import formats
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import example_inputs, run
from tests.execute.tool_models import Known, known, mixed, off

FORMATS = {
    "compressed_tensors": [
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
        "keep",
    ],
    "autoround": ["int4-c", "uint4-g32", "int8-c", "uint8-c", "int2-g16", "uint2-g16", "keep"],
    "onnx": [
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
    ],
    "openvino": [
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
    ],
    "modelopt": [
        "int4-c",
        "int4-g32",
        "int8-c",
        "e4m3-c",
        "int2-g16",
        "e4m3-t",
        "keep",
        "int8-t",
        "int3-c",
    ],
}


def half(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: half(v) for k, v in value.items()}
    return value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def with_compressed_tensors(there: Known, folder: Path) -> torch.Tensor:
    import diffusers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    kind = getattr(diffusers, type(there.model).__name__)
    held = kind.load_config(folder)
    model, config = (
        kind.from_config(held).eval(),
        QuantizationConfig.model_validate(held["quantization_config"]),
    )
    apply_quantization_config(model, config, show_progress=False)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    compressor.decompress_model(model)
    return run(model.float(), there.call)


def with_autoround(there: Known, folder: Path) -> torch.Tensor:
    import dataclasses

    import diffusers

    model = (
        getattr(diffusers, type(there.model).__name__)
        .from_pretrained(folder, torch_dtype=torch.float16)
        .eval()
    )
    call = dataclasses.replace(
        there.call, args=tuple(map(half, there.call.args)), kwargs=half(there.call.kwargs)
    )
    return run(model, call)


def feed(there: Known) -> dict[str, Any]:
    return {
        name: value.numpy()
        for name, value in example_inputs(there.call, there.model).items()
        if isinstance(value, torch.Tensor)
    }


def with_onnx(there: Known, folder: Path) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    given = feed(there)
    return torch.from_numpy(
        session.run(None, {i.name: given[i.name] for i in session.get_inputs()})[0]
    )


def with_openvino(there: Known, folder: Path) -> torch.Tensor:
    import openvino

    rules = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled, given = (
        openvino.Core().compile_model(str(folder / "model.xml"), "CPU", rules),
        feed(there),
    )
    return torch.from_numpy(
        compiled({i.get_any_name(): given[i.get_any_name()] for i in compiled.inputs})[0]
    )


def with_modelopt(there: Known, folder: Path) -> torch.Tensor:
    import copy

    import modelopt.torch.quantization as mtq
    import yaml

    model = copy.deepcopy(there.model)
    mtq.quantize(
        model, yaml.safe_load((folder / "quant_cfg.yaml").read_text()), lambda m: run(m, there.call)
    )
    return run(model, there.call)


RUN: dict[str, Callable[[Known, Path], torch.Tensor]] = {
    "compressed_tensors": with_compressed_tensors,
    "autoround": with_autoround,
    "onnx": with_onnx,
    "openvino": with_openvino,
    "modelopt": with_modelopt,
}


def row(tool: str, model: str) -> dict[str, Any]:
    there, exporter = known(model), plugins.load("exporters", tool)
    plan = mixed(there.graph, tool, FORMATS[tool])
    calibration = calibrate(there.model, there.graph, [there.call], moments=False)
    folder = Path(tempfile.mkdtemp())
    files = exporter.write(there.job(plan, calibration), folder)
    found = exporter.read(folder, there.graph)
    wanted = there.simulated(plan, calibration)
    share = off(RUN[tool](there, folder), wanted, there.output)
    return {
        "tool": tool,
        "model": model,
        "formats": len({str(s) for s in plan.layers.values()}),
        "quantized": sum(s != KEEP for s in plan.layers.values()),
        "read back": sum(found[name] == scheme for name, scheme in formats(plan.layers).items()),
        "layers": len(plan.layers),
        "MB": sum(path.stat().st_size for path in files) / 1e6,
        "off": share,
        "dB": -20 * math.log10(share),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", nargs="+", default=list(RUN))
    parser.add_argument("--models", nargs="+", default=["scenes-dit", "scenes-unet"])
    asked = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    rows = (
        {(r["tool"], r["model"]): r for r in json.loads(path.read_text())["rows"]}
        if path.is_file()
        else {}
    )
    for tool in asked.tools:
        for model in asked.models:
            try:
                rows[tool, model] = row(tool, model)
            except ModuleNotFoundError as error:
                print(f"{tool}: {error.name} is not installed")
                continue
            publish(__file__, list(rows.values()), title="tools", seed=0)


if __name__ == "__main__":
    main()
