"""ComfyUI's formats at equal file size: plans that mix all of them, or one of 4 bits with one of 8,
against plain int8 and plain fp8.

    python notebooks/figures/comfyui_formats.py [--samples 32 --steps 20 --probes 16 --seed 0]
    [--models scenes-dit scenes-unet] [--followed scenes-dit] [--folder FOLDER]

For each denoiser two sizes: the stored bytes of `int8-c+a8` (ComfyUI's int8, which rounds inputs)
and of `e4m3-t` (its fp8), each on all layers that can have it, the others in 16 bits. Plans are the
allocator's, from one table of probes, within the bytes of the plain one and with what `--for
comfyui` offers and ties: of all formats; of those whose inputs are rounded too, as plain int8's
are, so that products are of integers; and of one format of 4 bits, one of 8 and 16 bits, of which
the three mixes of least predicted noise are measured. `prices`: of single steps, or, for the
denoisers of `--followed`, of errors followed through the whole guided sampler (`mode: trajectory`)
to the final latents: the same plans again. A format is ComfyUI's layout, with its inputs
as they are or rounded, as the plan says layer by layer. `plain int8, inputs as they are` says what
not rounding them gives alone. Rounded inputs are `simulate`'s, between the smallest and the largest
of a token, where ComfyUI's are about 0. Codes are the nearest, without GPTQ.

`MB`: the exported file, read back. sqnr (dB, of the final latents), ssim, alignment and frechet
over captions that no plan was made from, with the same noise for all plans; ± is the standard error
over samples. `d`: mean of paired differences from the plain plan of that size. Writes
comfyui_formats.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ecar_plans import METRICS, row_of
from figure import publish

from qsearch.core import plugins
from qsearch.core.cost import Budget
from qsearch.core.errors import InfeasibleBudget
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.decide.allocation import allocate
from qsearch.decide.objectives import Objective
from qsearch.execute.exports import export
from qsearch.measure.evaluation import Outcome, evaluated, make
from qsearch.stages import config as configs
from qsearch.stages.calibrate import calibration_calls, plan_weights
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.plans import constraints_of, predicted_loss
from qsearch.stages.profile import profile

CONFIGS = Path(__file__).parents[2] / "configs"
TOOL = "comfyui"
PLAIN = {"int8": "int8-c+a8", "fp8": "e4m3-t"}
#: ComfyUI's layouts of 4 and of 8 bits -> their schemes
FOUR = {
    "nvfp4": ("nvfp4",),
    "awq_w4a16": ("uint4-g64",),
    "convrot_w4a4": ("int4-c+a4~rotate",),
    "asym_w4a8_int8": ("cb4~rotate", "cb4+a8~rotate"),
}
EIGHT = {
    "int8_tensorwise": ("int8-c", "int8-c+a8"),
    "int8_tensorwise with convrot": ("int8-c~rotate", "int8-c+a8~rotate"),
    "float8_e4m3fn": ("e4m3-t",),
    "mxfp8": ("mxfp8",),
}
ALL = tuple(text for texts in (*FOUR.values(), *EIGHT.values()) for text in texts)
ROUNDED = tuple(text for text in ALL if "+a" in text)
MIXES = {f"{a}, {b}, 16 bits": x + y for a, x in FOUR.items() for b, y in EIGHT.items()}
#: what prices are of -> settings of `profile`
PRICES: dict[str, dict[str, Any]] = {
    "steps": {"metrics": ["noise"]},
    "sampler": {"mode": "trajectory", "metrics": ["sqnr"]},
}
#: how many of the mixes are measured
_BEST = 3


def run_of(name: str, options: argparse.Namespace, prices: str) -> Run:
    """The main job's run of that denoiser, priced for ComfyUI's formats."""
    config = configs.load(CONFIGS / f"{name}.yaml")
    more = PRICES[prices]
    asked = config.profile.model_copy(update={"schemes": ALL, "probes": options.probes, **more})
    told = config.allocate.model_copy(update={"target": TOOL, "metric": asked.metrics[0]})
    changes: dict[str, Any] = {"profile": asked, "allocate": told, "seed": options.seed}
    changes["folder"] = options.folder / f"{name}-{prices}"
    changes["sampling"] = config.sampling.model_copy(update={"steps": options.steps})
    return Run(config.model_copy(update=changes))


def uniform(graph: OpGraph, text: str) -> Plan:
    """The scheme wherever ComfyUI has it, 16 bits elsewhere."""
    exporter, scheme = plugins.load("exporters", TOOL), Scheme.parse(text)
    able = (layer for layer in graph if exporter.nearest(scheme, layer) == scheme)
    return Plan.uniform(graph, KEEP).replaced(graph, {layer.name: scheme for layer in able})


def plans_of(
    run: Run, graph: OpGraph, size: str, mixes: Sequence[str]
) -> Iterator[tuple[str, Plan]]:
    """(name, plan) by the run's prices, at the bytes of the plain plan of that size: of all
    formats, of rounded inputs, and of these mixes, or of the best where none are given.
    """
    table = profile(run, graph)
    rules = constraints_of(run.config.allocate, graph, table)
    budget = Budget(average_bits=uniform(graph, PLAIN[size]).achieved.average_bits)
    objective = Objective({run.config.allocate.metric: 1.0})

    def best(schemes: tuple[str, ...]) -> Plan:
        named: dict[str, Any] = {"constraints": rules, "objective": objective}
        return allocate(graph, table, budget, schemes=schemes, **named)

    yield "all formats", best(ALL)
    yield "all formats with rounded inputs", best(ROUNDED)
    made: dict[str, Plan] = {}
    for name in mixes or MIXES:
        with suppress(InfeasibleBudget):
            made[name] = best(MIXES[name])
    order = sorted(made, key=lambda name: predicted_loss(made[name]))
    print(size, {name: predicted_loss(made[name]) for name in order}, flush=True)
    yield from ((name, made[name]) for name in list(made if mixes else order)[:_BEST])


def written(run: Run, graph: OpGraph, plan: Plan) -> float:
    """MB of the files, which `export` reads back."""
    with tempfile.TemporaryDirectory() as place:
        files = export(plan, graph, run.model_folder, TOOL, Path(place) / "out")
        return sum(path.stat().st_size for path in files) / 1e6


def measured(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each plan of a denoiser."""
    run = run_of(name, options, "steps")
    graph = extract(run)
    prompts = run.prompts(options.samples, part=1)
    sampling = replace(run.sampling, seed=500_000)

    def made(plan: Plan) -> Outcome:
        calls = calibration_calls(run, graph, plan.schemes)
        weights = plan_weights(run, graph, plan, calls, learn=False)
        return make(run.pipe, graph, plan, prompts, sampling, weights=weights)

    whole = made(Plan.uniform(graph, KEEP))
    found, _ = evaluated(whole, whole, METRICS)
    first: dict[str, Any] = {"model": name, "size of": "-", "prices": "-"}
    first["MB"] = written(run, graph, Plan.uniform(graph, KEEP))
    rows = [first | row_of("full precision", 16.0, found, {})]
    plain: dict[str, dict[str, list[float]]] = {}

    def add(size: str, prices: str, title: str, plan: Plan) -> None:
        found, values = evaluated(made(plan), whole, METRICS)
        held = plain.setdefault(size, values)  # the plain plan comes first
        pairs = {
            metric: [a - b for a, b in zip(values[metric], held[metric], strict=True)]
            for metric in ("sqnr", "ssim", "alignment")
            if values is not held
        }
        row = {"model": name, "size of": size, "prices": prices, "MB": written(run, graph, plan)}
        rows.append(row | row_of(title, plan.achieved.average_bits, found, pairs))
        print(rows[-1], flush=True)

    for size, text in PLAIN.items():
        add(size, "-", f"plain {size}", uniform(graph, text))
        scheme = Scheme.parse(text)
        if scheme.activation:
            bare = uniform(graph, str(scheme.weight_only))
            add(size, "-", f"plain {size}, inputs as they are", bare)
        taken = []
        for title, plan in plans_of(run, graph, size, ()):
            add(size, "steps", title, plan)
            taken += [title] if title in MIXES else []
        if name in options.followed:
            other = run_of(name, options, "sampler")
            for title, plan in plans_of(other, extract(other), size, taken):
                add(size, "sampler", title, plan)
    return rows


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["scenes-dit", "scenes-unet"])
    parser.add_argument("--followed", nargs="*", default=["scenes-dit"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/comfyui-formats"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, began = [], time.process_time()
    for name in options.models:
        rows += measured(name, options)
    extra = {"CPU seconds": time.process_time() - began}
    title = "ComfyUI's formats at the bytes of plain int8 and fp8"
    publish(__file__, rows, title=title, seed=options.seed, extra=extra)


if __name__ == "__main__":
    main()
