"""Plain against scale-aware AdaRound with the learning rate swept for both, GPTQ and rounding to
nearest beside them, on layers of the zoo.

    python notebooks/figures/rounding.py [--zoo scenes-dit] [--layers 4] [--scheme e2m1-g128]
    [--rates 1e-3 1e-2 …] [--steps 200 1000] [--samples 8]

Output SQNR of each layer alone, in dB over its own full-precision output without the bias, by the
second moments of the inputs it meets in sampling: half of the recorded steps choose the rounding,
the other half measure it. Layers are spread evenly over those with most weights. `--first` takes
first layers of feed-forwards, which FP4DiT gives another format. Writes rounding.json.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from figure import publish

from qsearch import zoo
from qsearch.choices.moments import columns_of, output_error
from qsearch.choices.quantization import to_groups
from qsearch.choices.statistics import LayerInputs
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    scene_prompts,
)

Records = tuple[Any, OpGraph, list[str], dict[str, LayerInputs], dict[str, LayerInputs]]


def records(options: argparse.Namespace) -> Records:
    """(denoiser, graph, layers, inputs to choose by, inputs to measure by)."""
    pipe = load_pipeline(zoo.folder(options.zoo))
    model = denoiser_of(pipe)
    calls = record(
        pipe,
        scene_prompts(options.samples, 1),
        Sampling(steps=10, seed=1, batch=options.samples),
        6,
    )
    graph = extract(model, example_inputs(calls[0], model), name=options.zoo)
    linear = [
        n
        for n in graph.quantizable
        if n.kind == "linear"
        and n.sees == "image"
        and (not options.first or n.role == "feed-forward-in")
    ]
    largest = sorted(
        sorted(linear, key=lambda n: -n.weights)[: 4 * options.layers], key=lambda n: n.name
    )
    names = [n.name for n in largest[:: max(1, len(largest) // options.layers)][: options.layers]]
    return (
        model,
        graph,
        names,
        calibrate(model, graph, calls[0::2], names),
        calibrate(model, graph, calls[1::2], names),
    )


def decibel(weight: torch.Tensor, made: torch.Tensor, moments: torch.Tensor) -> float:
    return 10 * math.log10(
        float(output_error(weight, moments).sum())
        / float(output_error(made - weight, moments).sum())
    )


def main() -> None:
    """Sweep and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit", choices=zoo.NAMES)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--first", action="store_true", help="first layers of feed-forwards only")
    parser.add_argument("--scheme", default="e2m1-g128")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    model, _, names, choose, measure = records(options)
    scheme, rows = Scheme.parse(options.scheme), []
    trials: list[tuple[str, dict[str, Any]]] = [("minmax", {}), ("search", {}), ("gptq", {})]
    trials += [
        (m, {"rate": r, "steps": s})
        for m in ("adaround", "adaround_scaled")
        for s in options.steps
        for r in options.rates
    ]
    for method, settings in trials:
        plugin, levels, spent = plugins.load("quantizers", method), [], 0.0
        for name in names:
            weight = model.get_submodule(name).weight.data
            groups, given = to_groups(weight, scheme), choose[name].moments
            told = measure[name].moments
            assert given is not None and told is not None
            began = time.process_time()
            made = plugin.quantize(
                groups, scheme, *((given,) if plugin.needs_inputs else ()), **settings
            ).values()
            spent += time.process_time() - began
            levels.append(decibel(weight, columns_of(made, scheme, given), told))
        mean = sum(levels) / len(levels)
        error = math.sqrt(
            sum((v - mean) ** 2 for v in levels) / max(1, len(levels) - 1) / len(levels)
        )
        row = {
            "method": method,
            "rate": settings.get("rate", "-"),
            "steps": settings.get("steps", "-"),
            "output dB": mean,
            "± over layers": error,
        }
        rows.append(row | {"CPU s": spent})
        print(rows[-1], flush=True)
    publish(
        __file__,
        rows,
        title=f"rounding: {options.scheme} on {len(names)} layers of {options.zoo}",
        seed=1,
        extra={"layers": names},
    )


if __name__ == "__main__":
    main()
