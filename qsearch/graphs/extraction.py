"""extract(model, example_inputs) -> OpGraph: layers with shapes, multiply-accumulates, roles and blocks, read from one call.

One forward on the example inputs, with a hook on every module that holds a weight, gives names that resolve, calls in order of
execution, and what flowed in. No code per model. The weights are not read, so a model on the meta device does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import Block, LayerSpec, Op, OpGraph
from . import roles

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kind_of(module: nn.Module) -> str:
    """linear, conv1d/2d/3d, conv-transpose1d/2d/3d, embedding, or "" for a module without a weight matrix."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return f"conv{module.weight.ndim - 2}d"
    if isinstance(module, _TRANSPOSED):
        return f"conv-transpose{module.weight.ndim - 2}d"
    # Linear layers of other libraries (diffusers' LoRACompatibleLinear, transformers' Conv1D) carry the same attributes.
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "weight", None), Tensor):
        return "linear" if module.weight.ndim == 2 else ""
    return ""


def _macs(module: nn.Module, kind: str, given: Tensor, made: Tensor) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kind == "embedding":
        return 0
    if kind == "linear":
        return made.numel() * weight.shape[1]
    # A convolution applies its kernel at each output place, a transposed one at each input place.
    places = made.numel() if kind.startswith("conv-") is False else given.numel()
    return places * math.prod(weight.shape[1:])


def _blocks(model: nn.Module, layers: list[str]) -> dict[str, str]:
    """layer -> the deepest member of a module list (a repeated block) that holds at least two layers."""
    members = {f"{name}.{i}" if name else i for name, module in model.named_modules() if isinstance(module, nn.ModuleList) for i, _ in module.named_children()}
    held = {m: sum(n.startswith(m + ".") for n in layers) for m in members}
    out = {}
    for name in layers:
        parts = name.split(".")
        holders = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
        out[name] = next((h for h in holders if held.get(h, 0) >= 2), "")
    return out


def extract(model: nn.Module, example_inputs: Mapping[str, Any], *, name: str = "") -> OpGraph:
    """Graph of `model` as called with the keyword arguments `example_inputs`.

    Raises `QSearchError` when the call fails, with the signature of the model's forward.
    """
    kinds = {n: k for n, m in model.named_modules() if (k := kind_of(m))}
    if not kinds:
        raise QSearchError(f"a model needs at least one layer with a weight; {type(model).__name__} has none")
    seen: dict[str, dict[str, Any]] = {}
    handles = []

    def hook(layer: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            # "keep": as long as the tensor lives, its id can't be another's
            entry = seen.setdefault(layer, {"order": len(seen), "source": id(given), "keep": given, "calls": 0, "macs": 0, "inputs": 0, "outputs": 0})
            entry["calls"] += 1
            entry["macs"] += _macs(module, kinds[layer], given, output)
            entry["inputs"] += given.numel()
            entry["outputs"] += output.numel()
            entry["shape"] = tuple(output.shape)

        return after

    training = {module: module.training for module in model.modules()}
    for layer in kinds:
        handles.append(model.get_submodule(layer).register_forward_hook(hook(layer), with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad():
            model(**example_inputs)
    except Exception as error:  # whatever a model raises when it is called wrongly
        import inspect

        signature, reason = inspect.signature(model.forward), next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise QSearchError(f"{type(model).__name__} can't be called with these example inputs ({reason}); its forward takes {signature}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()

    wired = {n: roles.Wiring(e["source"], e["order"]) for n, e in seen.items()}
    assigned = roles.assign(wired, kinds)
    order = sorted(kinds, key=lambda n: (seen[n]["order"] if n in seen else len(seen), n))
    blocks = _blocks(model, order)
    layers = []
    for n in order:
        module, entry = model.get_submodule(n), seen.get(n, {})
        weight = module.weight
        assert isinstance(weight, Tensor)
        layers.append(
            LayerSpec(
                name=n,
                role=assigned[n],
                kind=kinds[n],
                weight_shape=tuple(weight.shape),
                macs=int(entry.get("macs", 0)),
                block=blocks[n],
                channel_axis=1 if kinds[n].startswith("conv-") else 0,
                calls=int(entry.get("calls", 0)),
                inputs=int(entry.get("inputs", 0)),
                outputs=int(entry.get("outputs", 0)),
                bias=isinstance(getattr(module, "bias", None), Tensor),
                quantizable=kinds[n] != "embedding",
            )
        )
    ops = tuple(Op(n, kinds[n], layer=n, block=blocks[n], shape=tuple(seen[n]["shape"])) for n in order if n in seen)
    held: dict[str, list[str]] = {}
    for n in order:
        if blocks[n]:
            held.setdefault(blocks[n], []).append(n)
    block_nodes = tuple(Block(b, _block_kind([assigned[n] for n in members]), tuple(members), i) for i, (b, members) in enumerate(held.items()))
    return OpGraph(name or type(model).__name__, tuple(layers), ops=ops, blocks=block_nodes, source="hooks")


def _block_kind(found: list[str]) -> str:
    if any(r.startswith("resnet") for r in found):
        return "resnet"
    if any("attention" in r for r in found):
        return "transformer"
    return "feed-forward" if any(r.startswith("feed-forward") for r in found) else "layers"
