"""A LoRA on a quantized model: on top of packed layers, fused into them by rounding again, or fused
before anything is rounded.

    python notebooks/figures/lora.py [--zoo scenes-dit] [--rank 16] [--seeds 6] [--calls 4]

SQNR of the predicted noise in dB, over the full-precision model with the same LoRA: `on top`
leaves the LoRA in full precision beside the packed product, `fused` is `fuse_lora` (weight plus
LoRA, rounded again by the layer's own format, without data), `rounded once` quantizes the
full-precision sum. `effect`: the change that the LoRA makes to the quantized model's output, on top
or fused, over the change that it makes to the full-precision one. LoRAs are Gaussian factors on the
attentions' linear layers, scaled to a share of each weight's norm; all linear layers are quantized.
± is the standard error over seeds. Writes lora.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from figure import publish
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qsearch import apply, extract, zoo
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.measure.pipelines import (
    Call,
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    scene_prompts,
)

#: layer -> (down [rank, in], up [out, rank])
Factors = dict[str, tuple[Tensor, Tensor]]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FORMATS = ("int8-c", "nvfp4", "cb4", "int4-g32")
SHARES = (0.02, 0.1, 0.3)


def factors(model: nn.Module, rank: int, share: float, seed: int) -> Factors:
    """Of the attentions' layers; their product has `share` of the weight's norm."""
    dice = torch.Generator().manual_seed(seed)
    made: Factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(TARGETS):
            down = torch.randn(rank, layer.in_features, generator=dice)
            up = torch.randn(layer.out_features, rank, generator=dice)
            size = share * float(layer.weight.norm()) / float((up @ down).norm())
            made[name] = down, up * size
    return made


def adapted(model: nn.Module, held: Factors) -> list[LoraLayer]:
    """The model's layers with the LoRA on top, in place."""
    rank = len(next(iter(held.values()))[0])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(held))
    inject_adapter_in_model(config, model)
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for name, (down, up) in held.items():
        layers[name].lora_A["default"].weight.data.copy_(down)
        layers[name].lora_B["default"].weight.data.copy_(up)
    model.eval()
    return list(layers.values())


def fused(model: nn.Module, held: Factors) -> nn.Module:
    """The full-precision model with the LoRA in its weights."""
    other = copy.deepcopy(model)
    for name, (down, up) in held.items():
        other.get_submodule(name).weight.data += up @ down  # type: ignore[operator]
    return other


def outputs(model: nn.Module, calls: Sequence[Call]) -> Tensor:
    return torch.cat([run(model, call).flatten() for call in calls])


def decibel(signal: Tensor, error: Tensor) -> float:
    return 10 * math.log10(float(signal.square().sum()) / float(error.square().sum()))


def measured(
    model: nn.Module,
    graph: OpGraph,
    calls: Sequence[Call],
    scheme: str,
    held: Factors,
) -> dict[str, float]:
    """dB of the three ways with one LoRA."""
    plan = {x.name: Scheme.parse(scheme) for x in graph.quantizable if x.kind == "linear"}
    whole = fused(model, held)
    plain, wanted = outputs(model, calls), outputs(whole, calls)
    once = outputs(apply(whole, plan, graph), calls)
    packed = apply(copy.deepcopy(model), plan, graph)
    without = outputs(packed, calls)
    layers = adapted(packed, held)
    top = outputs(packed, calls)
    for layer in layers:
        layer.merge()  # what diffusers' fuse_lora calls
    again = outputs(packed, calls)
    effect = wanted - plain
    return {
        "on top dB": decibel(wanted, top - wanted),
        "fused dB": decibel(wanted, again - wanted),
        "rounded once dB": decibel(wanted, once - wanted),
        "effect on top dB": decibel(effect, top - without - effect),
        "effect fused dB": decibel(effect, again - without - effect),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


@torch.no_grad()
def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit", choices=zoo.NAMES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--calls", type=int, default=4, help="steps of the sampler")
    options = parser.parse_args()
    pipe = load_pipeline(zoo.folder(options.zoo))
    model = denoiser_of(pipe).eval()
    calls = record(pipe, scene_prompts(4, 0), Sampling(options.calls, batch=4), options.calls)
    graph = extract(model, example_inputs(calls[0], model), name=options.zoo)
    rows: list[dict[str, Any]] = []
    for scheme, share in itertools.product(FORMATS, SHARES):
        found = [
            measured(model, graph, calls, scheme, factors(model, options.rank, share, seed))
            for seed in range(options.seeds)
        ]
        row: dict[str, Any] = {"format": scheme, "LoRA / weight": share}
        for key in found[0]:
            mean, error = mean_and_error([one[key] for one in found])
            row |= {key: mean, f"± {key[:-3]}": error}
        lost = mean_and_error([one["on top dB"] - one["fused dB"] for one in found])
        rows.append(row | {"lost by fusing dB": lost[0], "± lost": lost[1]})
        print(rows[-1], flush=True)
    publish(
        __file__,
        rows,
        title=f"a LoRA of rank {options.rank} on {options.zoo}, {options.seeds} seeds",
        seed=0,
    )


if __name__ == "__main__":
    main()
