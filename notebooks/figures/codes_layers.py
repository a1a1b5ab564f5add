"""Rotations, trellis codes and low-rank branches on a denoiser's linear layers: SQNR of its output.

    python notebooks/figures/codes_layers.py [--zoo scenes-dit] [--states 10] [--only W A]

All linear layers of at least 32 outputs are quantized in one way, others are kept. Half of the
recorded sampler steps calibrate, the other half measure: dB of the denoiser's output over what
changed, its standard error over calls. `W`: weights alone, feedback by second moments everywhere,
one scale a row; `A`: weights and inputs of 4 bits in groups of 32. Stored bits are those in memory.
Weights are exchanged by hand and inputs rounded in hooks: what a plan will do, without one. Writes
codes_layers.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from figure import publish
from torch import Tensor, nn

from qsearch import zoo
from qsearch.choices.lowrank import refined
from qsearch.choices.quantization import to_groups
from qsearch.choices.smoothing import smoothed, smoothing_scale
from qsearch.choices.statistics import LayerInputs
from qsearch.choices.trellis import trellis_codes
from qsearch.core import plugins
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
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
from qsearch_kernels.hadamard import group_of, rotate, rotate_moments


@dataclass
class Layer:
    """One linear layer: its weight, what goes into it, the largest group that rotates it."""

    name: str
    weight: Tensor
    moments: Tensor
    rows: Tensor
    group: int


@dataclass
class Made:
    """What stands in a layer's place: `before(x)` meets `weight`, and `x` itself `beside`."""

    weight: Tensor
    bits: float
    before: Callable[[Tensor], Tensor] | None = None
    beside: Tensor | None = None


def scalar(weight: Tensor, form: str, method: str, moments: Tensor | None) -> tuple[Tensor, float]:
    """(values, stored bits) of a scalar scheme."""
    scheme = Scheme.parse(form)
    plugin = plugins.load("quantizers", method)
    given = (moments,) if plugin.needs_inputs else ()
    made = plugin.quantize(to_groups(weight, scheme), scheme, *given).values()
    values = made.reshape(len(weight), -1)[:, : weight.shape[1]]
    return values, scheme.stored_bits(weight.shape)


def turned(layer: Layer) -> tuple[Tensor, Tensor]:
    """The weight and the moments of a layer whose inputs are rotated."""
    return rotate(layer.weight, layer.group), rotate_moments(layer.moments, layer.group)


def weights_only(kind: str, bits: int, states: int) -> Callable[[Layer], Made]:
    """How one layer's weight is made at `bits`, its inputs untouched."""

    def make(layer: Layer) -> Made:
        weight, moments = turned(layer) if "rotated" in kind else (layer.weight, layer.moments)
        stored: float
        if "trellis" in kind:
            codes = trellis_codes(weight, bits, states, moments, layer.name)
            values, stored = codes.values(), codes.stored_bits
        else:
            values, stored = scalar(weight, f"int{bits}-c", "gptq", moments)
        back = rotate(values, layer.group) if "rotated" in kind else values
        return Made(back, stored)

    return make


def four_bits(x: Tensor) -> Tensor:
    """Inputs rounded to symmetric 4-bit integers, a scale for 32 neighbours."""
    groups = x.unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-12)
    made: Tensor = ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)
    return made


def both(kind: str) -> Callable[[Layer], Made]:
    """How one layer of 4-bit weights and 4-bit inputs is made, in groups of 32."""

    def make(layer: Layer) -> Made:
        weight, moments, form = layer.weight, layer.moments, "int4-g32"
        method = "gptq" if "GPTQ" in kind else "minmax"
        change: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
        if "balanced" in kind:
            spans = layer.rows.abs().amax(0), weight.abs().amax(0)
            scale = smoothing_scale(*spans, 0.5, 0.5)
        elif "searched" in kind:
            scale = smoothed(weight, layer.rows, _plain, layer=layer.name).scale
        else:
            scale = torch.ones(weight.shape[1])
        weight, moments = weight * scale, moments / torch.outer(scale, scale)
        change = lambda x: x / scale  # noqa: E731
        if "rotated" in kind:
            moved = Layer(layer.name, weight, moments, layer.rows, layer.group)
            weight, moments = turned(moved)
            change = lambda x: rotate(x / scale, layer.group)  # noqa: E731
        rank = int(kind.partition("rank ")[2].split(",")[0] or 0)
        if not rank:
            values, stored = scalar(weight, form, method, moments)
            return Made(values, stored, lambda x: four_bits(change(x)))
        bits: list[float] = []

        def quantize(rest: Tensor) -> Tensor:
            made, stored = scalar(rest, form, method, moments)
            bits.append(stored)
            return made

        low, values = refined(weight, rank, quantize, moments, layer.name)
        beside = low.values()
        beside = (rotate(beside, layer.group) if "rotated" in kind else beside) / scale
        return Made(values, bits[0] + low.stored_bits, lambda x: four_bits(change(x)), beside)

    return make


def _plain(weight: Tensor, rows: Tensor) -> Tensor:
    values, _ = scalar(weight, "int4-g32", "minmax", None)
    return four_bits(rows) @ values.T


class Exchanged(nn.Module):
    """A linear layer of `Made`."""

    def __init__(self, made: Made, bias: Tensor | None) -> None:
        super().__init__()
        self.made, self.bias = made, bias

    def forward(self, x: Tensor) -> Tensor:
        """Its output."""
        given = x if self.made.before is None else self.made.before(x)
        y = nn.functional.linear(given, self.made.weight, self.bias)
        return y if self.made.beside is None else y + x @ self.made.beside.T


def sqnr(model: nn.Module, calls: list[Call], truth: list[Tensor]) -> tuple[float, float]:
    """(dB, its standard error over calls, leaving one out)."""
    off = [float((run(model, c) - t).square().sum()) for c, t in zip(calls, truth, strict=True)]
    own = [float(t.square().sum()) for t in truth]
    whole = 10 * math.log10(sum(own) / sum(off))
    left = [10 * math.log10((sum(own) - a) / (sum(off) - b)) for a, b in zip(own, off, strict=True)]
    mean = sum(left) / len(left)
    spread = sum((v - mean) ** 2 for v in left) * (len(left) - 1) / len(left)
    return whole, math.sqrt(spread)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit", choices=zoo.NAMES)
    parser.add_argument("--states", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=["W", "A"])
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    pipe = load_pipeline(zoo.folder(options.zoo))
    model = denoiser_of(pipe)
    sampling = Sampling(steps=10, seed=1, batch=options.samples)
    calls = record(pipe, scene_prompts(options.samples, 1), sampling, 10)
    graph = extract(model, example_inputs(calls[0], model), name=options.zoo)
    names = [
        spec.name for spec in graph.quantizable
        if isinstance(layer := model.get_submodule(spec.name), nn.Linear)
        and layer.out_features >= 32
    ]  # fmt: skip
    inputs = calibrate(model, graph, calls[0::2], names)
    layers = [_layer(model, name, inputs[name]) for name in names]
    truth = [run(model, call).clone() for call in calls[1::2]]
    tried: list[tuple[str, str, Callable[[Layer], Made]]] = []
    if "W" in options.only:
        for bits in (4, 3, 2):
            for kind in ("GPTQ", "rotated, GPTQ", "trellis", "rotated, trellis"):
                tried.append((f"W{bits}", kind, weights_only(kind, bits, options.states)))
    if "A" in options.only:
        kinds = (
            "plain", "GPTQ", "balanced", "searched", "balanced, GPTQ", "rotated", "rotated, GPTQ",
            "searched, rotated, GPTQ", "rank 16, GPTQ", "searched, rank 16, GPTQ",
            "rotated, rank 16, GPTQ",
        )  # fmt: skip
        tried += [("W4A4", kind, both(kind)) for kind in kinds]
    rows: list[dict[str, Any]] = []
    for what, kind, make in tried:
        began = time.process_time()
        made = {layer.name: make(layer) for layer in layers}
        spent = time.process_time() - began
        level, error = _measured(model, made, calls[1::2], truth)
        weights = sum(layer.weight.numel() for layer in layers)
        stored = sum(m.bits for m in made.values()) / weights
        rows.append({
            "what": what, "kind": kind, "stored bits": stored, "dB": level, "± over calls": error,
            "CPU s to quantize": spent,
        })  # fmt: skip
        print(rows[-1], flush=True)
    extra = {"states": options.states, "layers": len(layers), "zoo": options.zoo}
    publish(__file__, rows, title=f"{options.zoo}: codes of linear layers", seed=1, extra=extra)


def _layer(model: nn.Module, name: str, inputs: LayerInputs) -> Layer:
    weight = model.get_parameter(f"{name}.weight").data.float()
    assert inputs.moments is not None
    return Layer(name, weight, inputs.moments, inputs.rows, group_of(weight.shape[1]))


def _measured(
    model: nn.Module, made: dict[str, Made], calls: list[Call], truth: list[Tensor]
) -> tuple[float, float]:
    kept = {name: model.get_submodule(name) for name in made}
    try:
        for name, one in made.items():
            model.set_submodule(name, Exchanged(one, cast(Tensor | None, kept[name].bias)))
        return sqnr(model, calls, truth)
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)


if __name__ == "__main__":
    main()
