"""Peers: what other tools make of the same denoiser, for races beside ours; each as its own
documentation says, in place, and only where it is installed.

optimum-quanto is not among them: its 8-bit product on a CPU (torch's `_weight_int8pack_mm`) reads
beyond small layers and takes the process with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Peer:
    """`needs`: the package; `quantize`: in place; `devices`: kinds of device that it runs on."""

    needs: str
    quantize: Callable[[nn.Module], None]
    devices: frozenset[str] = frozenset({"cpu", "cuda"})


def _torchao_w8a8(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def _torchao_w8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def _torchao_fp8(model: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _sdnq_w8a8(model: nn.Module) -> None:
    from sdnq import sdnq_post_load_quant

    sdnq_post_load_quant(
        model,
        weights_dtype="int8",
        use_quantized_matmul=True,
        quant_conv=True,
        use_quantized_matmul_conv=True,
        add_skip_keys=False,
    )


def _gemlite_w8a8(model: nn.Module) -> None:
    # gemlite 0.6 asks for a GPU's properties while it is imported
    from gemlite.helper import A8W8_INT8_dynamic, patch_model

    patch_model(model, device="cuda", processor=A8W8_INT8_dynamic())


PEERS = {
    "torchao-w8a8": Peer("torchao", _torchao_w8a8),
    "torchao-w8": Peer("torchao", _torchao_w8),
    "torchao-fp8": Peer("torchao", _torchao_fp8, frozenset({"cuda"})),
    "sdnq-w8a8": Peer("sdnq", _sdnq_w8a8),
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
