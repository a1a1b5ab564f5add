"""Exports whose readers want a GPU or are not in a package registry: loaded as far as a CPU can,
with their layouts read by public kernels for a CPU or in plain torch. And qsearch's own readers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qsearch.choices.fake_quantization import fake_quantize
from qsearch.choices.floats import FloatFormat
from qsearch.choices.statistics import LayerInputs
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute import nunchaku_layout as layout
from qsearch.execute import packed_file
from qsearch.execute.exporters import comfyui, gguf, modelopt_weights, nunchaku_lite
from qsearch.execute.runtime import packed_layers
from qsearch.measure.pipelines import run
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from tests.execute.tool_loaders import (
    CannotRunError,
    Loaded,
    dequantized,
    nunchaku_kernels,
    read_gguf,
)
from tests.execute.tool_models import Known

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class KitchenLinear(nn.Linear):
    """A linear layer that comfy-kitchen's eager kernels multiply, inputs rounded as they do."""

    def fill(self, held: Mapping[str, Tensor], name: str, said: Mapping[str, Any]) -> None:
        """Take the layer's tensors and its marker, and the weight as the kernels widen it."""
        self.entry = said
        self.own = {k.removeprefix(f"{name}."): v for k, v in held.items() if _of(k, name)}
        self.weight.data = kitchen_weight(held, name, said).float()

    def forward(self, x: Tensor) -> Tensor:
        """The product as the marker asks for it."""
        from comfy_kitchen.backends import eager

        form, group = self.entry["format"], self.entry.get("convrot_groupsize", 256)
        turned = bool(self.entry.get("convrot"))
        exact = self.entry.get("full_precision_matrix_mult") or form == "awq_w4a16"
        if exact:  # ComfyUI dequantizes, and multiplies as ever
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        weight, scale = self.own["weight"], self.own.get("weight_scale")
        if form == "asym_w4a8_int8":
            made = nn.functional.linear(rows, levels_tensor(self.own, self.entry), self.bias)
        elif form == "convrot_w4a4":
            made = eager.convrot_w4a4_linear(rows, weight, scale, self.bias, group)
        else:
            made = eager.int8_linear(rows, weight, scale, self.bias, torch.float32, turned, group)
        return made.reshape(*x.shape[:-1], -1)


def _of(key: str, name: str) -> bool:
    return key.rpartition(".")[0] == name


def levels_tensor(held: Mapping[str, Tensor], said: Mapping[str, Any]) -> Any:
    """comfy-kitchen's tensor of a layer in `asym_w4a8_int8`, from the layer's tensors."""
    from comfy_kitchen.tensor import AsymW4A8Int8Layout, QuantizedTensor

    outputs, half = held["weight"].shape
    params = AsymW4A8Int8Layout.Params(
        scale=held["weight_s_rel"],
        s_channel=held["weight_s_channel"],
        codebook=held["weight_codebook"],
        group_size=said["group_size"],
        convrot_groupsize=said["convrot_groupsize"],
        orig_dtype=torch.float32,
        orig_shape=(outputs, 2 * half),
    )
    return QuantizedTensor(held["weight"], "AsymW4A8Int8Layout", params)


def kitchen_weight(held: Mapping[str, Tensor], name: str, said: Mapping[str, Any]) -> Tensor:
    """A layer's weight as comfy-kitchen's eager kernels dequantize it, by its marker."""
    from comfy_kitchen.backends import eager

    weight, scale = held[f"{name}.weight"], held.get(f"{name}.weight_scale")
    group = said.get("convrot_groupsize")
    match said["format"]:
        case "nvfp4":
            unit = held[f"{name}.weight_scale_2"]
            found = eager.dequantize_nvfp4(weight, unit, scale, torch.float32)
        case "mxfp8":
            assert scale is not None
            eights = scale.view(torch.float8_e8m0fnu)
            found = eager.dequantize_mxfp8(weight, eights, torch.float32)
        case "float8_e4m3fn":
            found = eager.dequantize_per_tensor_fp8(weight, scale, torch.float32)
        case "convrot_w4a4":
            found = eager.dequantize_convrot_w4a4_weight(weight, scale, group)
        case "awq_w4a16":
            ones, zeros = torch.eye(weight.shape[1] * 2), held[f"{name}.weight_zeros"]
            found = eager.gemv_awq_w4a16(ones, weight, scale, zeros).mT
        case "asym_w4a8_int8":
            own = {k.removeprefix(f"{name}."): v for k, v in held.items() if _of(k, name)}
            found = levels_tensor(own, said).dequantize()
        case "int8_tensorwise" if said.get("convrot"):
            found = eager.dequantize_int8_convrot_weight(weight, scale, group)
        case "int8_tensorwise":
            found = eager.dequantize_int8_simple(weight, scale)
        case _:
            found = weight
    return found  # type: ignore[no-any-return]


def with_comfyui(there: Known, folder: Path) -> Loaded:
    """ComfyUI's layouts in comfy-kitchen's eager kernels, layer by layer in diffusers' denoiser."""
    held, said = tensors(folder), comfyui.markers(folder)
    model = copy.deepcopy(there.model)
    for name, entry in said.items():
        first: Any = model.get_submodule(name)
        made = KitchenLinear(first.in_features, first.out_features, first.bias is not None)
        made.bias = first.bias
        made.fill(held, name, entry)
        model.set_submodule(name, made)
    return Loaded(lambda: run(model, there.call), model=model)


def modelopt_weight(held: Mapping[str, Tensor], name: str) -> Tensor:
    """By ModelOpt's rule: two codes a byte with the first in the low bits, a scale for 16 weights,
    one for all.
    """
    weight, scale = held[f"{name}.weight"], held[f"{name}.weight_scale"].float()
    if weight.dtype != torch.uint8:
        return weight.float() * scale
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(1).int()
    values = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    spread = (scale * held[f"{name}.weight_scale_2"]).repeat_interleave(16, 1)
    return values * spread


class BranchedLinear(nn.Linear):
    """What `NVFP4_SVD` computes: the input smoothed, the branch of that, and the product of its
    rounding.
    """

    def fill(self, held: Mapping[str, Tensor], name: str) -> None:
        """Take the layer's tensors."""
        own = {k.removeprefix(f"{name}."): v.float() for k, v in held.items() if _of(k, name)}
        self.smooth = own["pre_quant_scale"]
        self.down, self.up = own["svdquant_lora_a"], own["svdquant_lora_b"]
        self.weight.data = modelopt_weight(held, name)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the branch."""
        smoothed = x * self.smooth
        rounded = fake_quantize(smoothed, Scheme.parse("keep+anvfp4"), None, -1)
        return super().forward(rounded) + (smoothed @ self.down.T) @ self.up.T


def with_modelopt_weights(
    there: Known, folder: Path, calibration: Mapping[str, LayerInputs]
) -> Loaded:
    """ModelOpt's written weights by the layout's rule in plain torch, inputs rounded by
    `simulate`.
    """
    held, found = tensors(folder), modelopt_weights.read(folder, there.graph)
    model = copy.deepcopy(there.model)
    for name, scheme in found.items():
        if scheme == KEEP:
            continue
        layer: Any = model.get_submodule(name)
        if scheme.transforms:
            made = BranchedLinear(layer.in_features, layer.out_features, layer.bias is not None)
            made.bias = layer.bias
            made.fill(held, name)
            model.set_submodule(name, made)
        else:
            layer.weight.data = modelopt_weight(held, name)
    inputs = {
        n: KEEP if s.transforms else replace(KEEP, activation=s.activation, grain=s.grain)
        for n, s in found.items()
    }
    plan = Plan.make(there.graph, inputs)

    def output() -> Tensor:
        with simulate(model, plan, there.graph, QuantizedWeights(model, there.graph, calibration)):
            return run(model, there.call)

    return Loaded(output, model=model)


class Kernels:
    """What Nunchaku's kernels compute, from the tensors as they lie in memory."""

    def quantize_w4a4_act_fuse_lora(
        self, x: Tensor, out: Tensor, scales: Tensor, down: Tensor, act: Tensor, *rest: Any
    ) -> None:
        """Smooth and round the input; the branch's first half reads it as it was."""
        smooth = layout.unpack_scales(rest[0]).float()
        form = "keep+anvfp4" if rest[2] else "keep+aint4g64"
        self.smoothed = fake_quantize(x.float() / smooth, Scheme.parse(form), None, -1)
        self.low = x.float() @ layout.unpack_down(down).float().T

    def gemm_w4a4(self, *args: Any) -> None:
        """The product of what was rounded last, with the branch and the bias."""
        _, weight, out, _, _, scales = args[:6]
        up, bias, nvfp4, alpha, channel = args[9], args[15], *args[22:25]
        codes = layout.unpack_codes(weight)
        if nvfp4:
            level = FloatFormat.named("e2m1").values()[codes & 15].unflatten(1, (-1, 16))
            dense = level * layout.unpack_micro(scales.float())[:, :, None]
            rest = alpha.float() * layout.unpack_scales(channel).float()
        else:
            level = codes.float().unflatten(1, (-1, 64))
            dense = level * layout.unpack_scales(scales).float()[:, :, None]
            rest = torch.ones(len(codes))
        made = rest * (self.smoothed @ dense.flatten(1).T)
        made = made + self.low @ layout.unpack_up(up).float().T
        made = made if bias is None else made + layout.unpack_scales(bias).float()
        out.copy_(made)

    def awq(self, x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, *_: Any) -> Tensor:
        """The product with 4-bit weights, widened."""
        codes = layout.unpack_awq(weight).float().unflatten(1, (-1, 64))
        dense = codes * scales.float().T[:, :, None] + zeros.float().T[:, :, None]
        return (x.float() @ dense.flatten(1).T).to(x.dtype)

    gemv_awq = awq_gemm_w4a16_g64_int32 = awq


def with_nunchaku_lite(there: Known, folder: Path) -> Loaded:
    """Nunchaku Lite by diffusers' own loader, strict in its keys; `Kernels` compute."""
    kind: Any = type(there.model)
    with nunchaku_kernels(SimpleNamespace(ops=Kernels())):
        model = kind.from_pretrained(folder, torch_dtype=torch.float32)
    classes = {"SVDQW4A4Linear": ("int4", "nvfp4"), "AWQW4A16Linear": ("uint4",)}
    formats = nunchaku_lite.read(folder, there.graph)
    for name, scheme in formats.items():
        own = classes.get(type(model.get_submodule(name)).__name__, ("keep",))
        if scheme.format not in own:
            formats[name] = Scheme.parse("keep")

    def output() -> Tensor:
        with nunchaku_kernels(SimpleNamespace(ops=Kernels())):
            return run(model, there.call)

    return Loaded(output, formats, model)


def with_qsearch_diffusers(there: Known, folder: Path) -> Loaded:
    """diffusers with qsearch's quantizer: it packs what it reads, saves it, and loads it again."""
    import qsearch.diffusers  # noqa: F401  (which tells diffusers of the quantizer)

    kind: Any = type(there.model)
    model = kind.from_pretrained(folder, torch_dtype=torch.float32)
    return Loaded(lambda: run(model, there.call), own_formats(there, model), model)


def with_packed_file(there: Known, folder: Path) -> Loaded:
    """qsearch's own packed file."""
    model = copy.deepcopy(there.model)
    packed_file.load(folder / "model.safetensors", model, there.graph)
    return Loaded(lambda: run(model, there.call), own_formats(there, model), model)


def own_formats(there: Known, model: nn.Module) -> dict[str, Scheme]:
    """What packed layers say."""
    found = {name: layer.scheme for name, layer in packed_layers(model).items()}
    return {x.name: replace(found.get(x.name, KEEP), method="") for x in there.graph}


def with_step_policy(there: Known, folder: Path) -> Loaded:
    """diffusers' resolver of step policies takes the configuration; servers with GPUs run it."""
    from diffusers.pipelines.cosmos.mixed_precision import Cosmos3MixedPrecisionConfig

    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if not Cosmos3MixedPrecisionConfig.resolve(None, quantization_config=said).enabled:
        raise CannotRunError(f"diffusers' resolver takes no policy of {said['quant_algo']}")

    def output() -> Tensor:
        raise CannotRunError("the file says how servers with GPUs quantize, and holds no weights")

    return Loaded(output)


def with_sd_cpp(there: Known, folder: Path) -> Loaded:
    """stable-diffusion.cpp: its conversion by our rules says the types, and its reader widens
    model.gguf, with which diffusers' denoiser computes: it builds models that it knows by name.
    """
    rules = (folder / gguf.RULES).read_text().strip()
    source = folder / "source.safetensors"
    _one_file(there, source)
    kinds, _ = _converted(source, folder / "by-rules.gguf", rules)
    _, held = _converted(folder / "model.gguf", folder / "widened.gguf", "", widen=True)
    return dequantized(there, kinds, held)


def _one_file(there: Known, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: x.contiguous() for n, x in there.model.state_dict().items()}, path)


def _converted(
    source: Path, made: Path, rules: str, widen: bool = False
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Types and values of the tensors that stable-diffusion.cpp writes."""
    from stable_diffusion_cpp import stable_diffusion_cpp as native

    kind = native.GGMLType.SD_TYPE_F32 if widen else native.GGMLType.SD_TYPE_COUNT
    given = (str(source).encode(), b"", str(made).encode(), int(kind), rules.encode(), False)
    if not native.convert(*given):
        raise ValueError(f"stable-diffusion.cpp does not convert {source.name}")
    return read_gguf(made)
