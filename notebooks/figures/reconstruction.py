"""Rounding and input scales learnt block by block: weights first and inputs after, or both at once,
at equal iterations; gates plain and scale-aware.

    python notebooks/figures/reconstruction.py [--zoo scenes-dit] [--blocks 2] [--bits 8 4] [--steps
    200] [--samples 4]

The layers of some repeated modules get 4-bit weights (`uint4-c`, and `e2m1-g32` for the gates) and
inputs in one static scale. Noise is that of the denoiser's output on calls that nothing was chosen
by, relative to its power, in dB. `block dB` is the signal over the error of the blocks' own outputs
on the calls that they learn from, and the three losses are those at a quarter, at a half and over
the last tenth of the iterations: TaQ-DiT's claim is that of `separate` they do not fall. Writes
reconstruction.json.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from figure import publish

from qsearch import zoo
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure.noise import relative_noise
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    scene_prompts,
)
from qsearch.measure.quantized_weights import calibrated_weights
from qsearch.measure.reconstruction import reconstruct
from qsearch.measure.simulation import simulate


def mean(values: Any) -> float:
    found = list(values)
    return float(sum(found)) / max(1, len(found))


def main() -> None:
    """Learn in every way, measure, publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit", choices=zoo.NAMES)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    pipe = load_pipeline(zoo.folder(options.zoo))
    model = denoiser_of(pipe)
    calls = record(
        pipe,
        scene_prompts(2 * options.samples, 1),
        Sampling(steps=8, seed=1, batch=32),
        4,
        batch=options.samples,
    )
    choose, held = calls[0::2], calls[1::2]  # of every step, half of the samples
    graph = extract(model, example_inputs(calls[0], model), name=options.zoo)
    repeated = list(
        dict.fromkeys(
            x.block
            for x in graph.quantizable
            if sum(y.block == x.block for y in graph.quantizable) > 5
        )
    )
    taken = repeated[:: max(1, len(repeated) // options.blocks)][: options.blocks]
    names, references, rows = (
        [x.name for x in graph.quantizable if x.block in taken],
        [run(model, call) for call in held],
        [],
    )
    for form, bits, gates in [("uint4-c", b, "adaround") for b in options.bits] + [
        ("e2m1-g32", options.bits[0], g) for g in ("adaround", "adaround_scaled")
    ]:
        for order in ("nearest", "separate", "joint"):
            scheme = Scheme.parse(f"{form}+a{bits}t" + (f"@{gates}" if order != "nearest" else ""))
            plan, began, blocks = dict.fromkeys(names, scheme), time.process_time(), []
            if order == "nearest":
                weights = calibrated_weights(model, graph, {n: [scheme] for n in names}, choose)
            else:
                made = reconstruct(model, graph, plan, choose, order=order, steps=options.steps)
                weights, blocks = made.weights, list(made.blocks)
            spent = time.process_time() - began
            with simulate(model, plan, graph, weights):
                found = [
                    relative_noise(run(model, call), y)
                    for call, y in zip(held, references, strict=True)
                ]
            noise, error = (
                mean(v for v, _ in found),
                math.sqrt(sum(e * e for _, e in found)) / len(found),
            )
            row = {
                "scheme": f"{form}+a{bits}t",
                "gates": gates if order != "nearest" else "-",
                "order": order,
                "held-out dB": -10 * math.log10(noise),
            }
            row |= {
                "± dB": 10 / math.log(10) * error / noise,
                "block dB": -10 * math.log10(mean(b.after for b in blocks))
                if blocks
                else float("nan"),
            }
            parts = ((0.15, 0.25), (0.4, 0.5), (0.9, 1.0))
            row |= {
                f"loss to {b:g}": mean(
                    mean(x.losses[int(a * len(x.losses)) : int(b * len(x.losses))]) for x in blocks
                )
                for a, b in parts
            }
            rows.append(row | {"CPU s": spent})
            print(rows[-1], flush=True)
    publish(
        __file__,
        rows,
        title=f"reconstruction: {len(taken)} blocks of {options.zoo}, {options.steps} "
        "iterations each",
        seed=0,
        extra={"blocks": taken},
    )


if __name__ == "__main__":
    main()
