"""Does the cost of probes grow with the number of choices? Passes and CPU seconds from 4 to 32
schemes a layer, beside the sweep's passes.

    python notebooks/figures/choices.py scenes-dit [--probes 24 --bins 2 --samples 4]

CPU seconds of this process on one thread, so that a busy machine does not matter; what is made
once, quantized weights, is told apart. Writes choices.json.
"""

from __future__ import annotations

import argparse
import time

from figure import publish

from qsearch import zoo
from qsearch.core import plugins
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure import gradients
from qsearch.measure.estimation import EstimationTask
from qsearch.measure.observation import observations
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    scene_prompts,
)
from qsearch.measure.profiling import profile

SCHEMES = [
    f"{kind}{bits}-{grain}"
    for grain in ("c", "g32", "g64", "t")
    for kind in ("uint", "int")
    for bits in (2, 4, 6, 8)
]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=zoo.NAMES)
    for name, value in {"probes": 24, "bins": 2, "samples": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    pipe = load_pipeline(zoo.folder(o.model))
    model = denoiser_of(pipe)
    calls = record(pipe, scene_prompts(o.samples, 0), Sampling(4), o.bins)
    graph = extract(model, example_inputs(calls[0], model), name=o.model)
    rows = []
    for count in (4, 8, 16, 32):
        task = EstimationTask(
            model,
            graph,
            tuple(Scheme.parse(s) for s in SCHEMES[:count]),
            tuple(observations(model, calls, ["noise"])),
            ("noise",),
            o.probes,
        )
        passes = {
            e: int(plugins.load("estimators", e).plan(task).split()[0].replace(",", ""))
            for e in ("probe", "sweep")
        }
        began = time.process_time()
        with gradients.Contraction(
            task
        ).watching():  # quantizes every weight, once for any number of probes
            making = time.process_time() - began
        began = time.process_time()
        profile(model, graph, SCHEMES[:count], calls, estimator="probe", probes=o.probes)
        spent = time.process_time() - began
        probing = (spent - making) / (o.probes * o.bins)
        first = rows[0]["CPU s a probe and step"] if rows else probing
        row = {
            "choices a layer": count,
            "passes": passes["probe"],
            "the sweep's": passes["sweep"],
            "fewer by": passes["sweep"] / passes["probe"],
        }
        rows.append(
            row
            | {
                "at 794 layers": passes["sweep"] / passes["probe"] * 794 / len(graph.quantizable),
                "CPU s to quantize once": making,
            }
        )
        rows[-1] |= {"CPU s a probe and step": probing, "over 4 choices": probing / first}
        print(rows[-1], flush=True)
    publish(
        __file__,
        rows,
        title=f"{o.model}: probes by the number of choices, {o.probes} probes",
        seed=0,
    )


if __name__ == "__main__":
    main()
