"""Post-GELU inputs by sampling step: shift, migration and a scale for each token, with the
asymmetric baseline in.

    python notebooks/figures/post_gelu.py [--zoo scenes-dit] [--layers 4] [--bits 8 6 4] [--samples
    8]

Output SQNR in dB of the second layers of feed-forwards, their weights in full precision, on calls
of the sampler that calibration did not see: the first, the middle and the last of them, and all.
`symmetric` is one static scale about zero, the baseline of TaQ-DiT's claim; all others are
asymmetric. Writes post_gelu.json.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from figure import publish

from qsearch import zoo
from qsearch.choices.codes import qparams_from_range, quantize_to_grid
from qsearch.choices.input_quantizer import fit_input_quantizer
from qsearch.choices.statistics import LayerInputs
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    scene_prompts,
)

SCHEMES = (
    "keep+a{}t",
    "keep+a{}t~shift",
    "keep+a{}t~migrate",
    "keep+a{}t~shift~migrate",
    "keep+a{}t~balance",
    "keep+a{}c",
    "keep+a{}",
)


def inputs_of(model: Any, names: list[str], calls: list[Any]) -> list[dict[str, torch.Tensor]]:
    """layer -> its input, for each call."""
    heard: list[dict[str, torch.Tensor]] = []

    def listen(name: str) -> Any:
        return model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: heard[-1].update({name: args[0].detach().float()})
        )

    handles = [listen(name) for name in names]
    for call in calls:
        heard.append({})
        run(model, call)
    for handle in handles:
        handle.remove()
    return heard


def symmetric(x: torch.Tensor, inputs: LayerInputs, bits: int) -> torch.Tensor:
    """One static scale about zero."""
    scheme, size = Scheme(f"int{bits}"), torch.maximum(inputs.high.max(), -inputs.low.min())
    return quantize_to_grid(x, *qparams_from_range(-size, size, scheme), scheme).values()


def main() -> None:
    """Round, compare, publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", default="scenes-dit", choices=zoo.NAMES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    pipe = load_pipeline(zoo.folder(options.zoo))
    model = denoiser_of(pipe)
    calls = record(
        pipe,
        scene_prompts(options.samples, 1),
        Sampling(steps=12, seed=1, batch=options.samples),
        6,
    )
    graph = extract(model, example_inputs(calls[0], model), name=options.zoo)
    found = [n.name for n in graph.quantizable if n.role == "feed-forward-out"]
    names = found[:: max(1, len(found) // options.layers)][: options.layers]
    calibration = calibrate(model, graph, calls[0::2], names, moments=False)
    heard, rows = inputs_of(model, names, calls[1::2]), []
    for bits in options.bits:
        for text in ("symmetric", *(s.format(bits) for s in SCHEMES)):
            power = torch.zeros(len(heard), 2, dtype=torch.double)
            for name in names:
                module, scheme = (
                    model.get_submodule(name),
                    Scheme.parse(text if text != "symmetric" else "keep"),
                )
                quantizer = fit_input_quantizer(
                    scheme,
                    module.get_parameter("weight").data,
                    module,
                    calibration[name],
                    layer=name,
                )
                for step, inputs in enumerate(heard):
                    x, weight = inputs[name], module.get_parameter("weight").data
                    made = (
                        quantizer.fake_quantize(x)
                        if quantizer
                        else symmetric(x, calibration[name], bits)
                    )
                    truth = F.linear(x, weight)
                    power[step] += (
                        torch.stack(
                            [
                                truth.double().square().sum(),
                                (F.linear(made, weight) - truth).double().square().sum(),
                            ]
                        )
                        / truth.square().sum()
                    )
            level = [
                10 * math.log10(float(p[0] / p[1]))
                for p in (power[0], power[len(power) // 2], power[-1], power.sum(0))
            ]
            rows.append(
                {
                    "bits": bits,
                    "input": text,
                    "first dB": level[0],
                    "middle dB": level[1],
                    "last dB": level[2],
                    "all dB": level[3],
                }
            )
            print(rows[-1], flush=True)
    publish(
        __file__,
        rows,
        title=f"post-GELU inputs of {len(names)} layers of {options.zoo}",
        seed=1,
        extra={"layers": names},
    )


if __name__ == "__main__":
    main()
