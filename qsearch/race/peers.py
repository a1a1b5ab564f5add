"""Peers: what other tools make of the same denoiser, for races beside ours; each as its own
documentation says, and only where it is installed.

optimum-quanto is not among them: its 8-bit product on a CPU (torch's `_weight_int8pack_mm`) reads
beyond small layers and takes the process with it.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..execute.exporters.openvino import converted
from ..execute.tracing import leaves


@dataclass(frozen=True)
class Peer:
    """`needs`: the package; `quantize`: (model, arguments of a call) -> what is called instead, may
    be the model itself; `devices`: kinds of device that it runs on; `last`: on a CPU nothing may be
    compiled after it.
    """

    needs: str
    quantize: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    last: bool = False


def _torchao_w8a8(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _torchao_w8(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def _torchao_fp8(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def _sdnq_w8a8(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    sdnq_post_load_quant(
        model,
        weights_dtype="int8",
        use_quantized_matmul=True,
        quant_conv=True,
        use_quantized_matmul_conv=True,
        add_skip_keys=False,
    )
    return model


def _gemlite_w8a8(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    # gemlite 0.6 asks for a GPU's properties while it is imported
    from gemlite.helper import A8W8_INT8_dynamic, patch_model

    patch_model(model, device="cuda", processor=A8W8_INT8_dynamic())
    return model


class _Compiled(nn.Module):
    """A network that OpenVINO compiled, called as the model was."""

    def __init__(self, network: Any, names: tuple[str, ...], stored_bytes: int) -> None:
        super().__init__()
        self.network, self.names, self.stored_bytes = network, names, stored_bytes

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """The first of what the denoiser returns."""
        tensors = dict(leaves(inputs))
        made = self.network([tensors[name].numpy() for name in self.names])
        return (torch.from_numpy(made[0]),)


def _openvino_w8a8(model: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    import nncf
    import openvino as ov

    wrapped, made = converted(model, dict(inputs))
    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = nncf.compress_weights(made, mode=nncf.CompressWeightsMode.INT8_ASYM)
    held = [node for node in made.get_ops() if node.get_type_name() == "Constant"]
    # the CPU's plug-in rounds inputs of compressed layers to 8 bits where that is faster for it
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    network = ov.Core().compile_model(made, "CPU", settings)
    return _Compiled(network, wrapped.names, sum(node.get_byte_size() for node in held))


#: with torch 2.13 a CPU's `torch.compile` after torchao 0.18's `quantize_` may abort (double free)
PEERS = {
    "torchao-w8a8": Peer("torchao", _torchao_w8a8, last=True),
    "torchao-w8": Peer("torchao", _torchao_w8, last=True),
    "torchao-fp8": Peer("torchao", _torchao_fp8, frozenset({"cuda"})),
    "sdnq-w8a8": Peer("sdnq", _sdnq_w8a8),
    "openvino-w8a8": Peer("nncf", _openvino_w8a8, frozenset({"cpu"})),
    "gemlite-w8a8": Peer("gemlite", _gemlite_w8a8, frozenset({"cuda"})),
}


def here(device: str) -> list[str]:
    """Names of the peers whose package is installed and that run on `device` (a kind: cpu,
    cuda).
    """
    return [
        name
        for name, peer in PEERS.items()
        if device in peer.devices and importlib.util.find_spec(peer.needs) is not None
    ]
