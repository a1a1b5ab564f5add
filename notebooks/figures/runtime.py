"""Plans at work on a CPU: parity with simulation, bytes in memory, and pipelines end to end.

    python notebooks/figures/runtime.py --part parity [--schemes uint4-c int8-c+a8 …]
    python notebooks/figures/runtime.py --part memory
    python notebooks/figures/runtime.py --part pipelines [--levels native avx2] [--captions 16]
    [--seconds 2] [--threads 1] [--clock wall]

Each part writes runtime-PART.json. Parity: the largest difference between any layer of the packed
model and the same layer simulated, on the same input, of that layer's largest output. Memory: what
packed layers store over what `core/plan.py` computes. Pipelines: `--captions` pictures at once, two
steps of the sampler, text encoder and VAE included, all contenders in turn in one process for each
of `--levels` (levels.py).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figure import publish
from levels import LEVELS, found_at, hand_back

from qsearch import zoo
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.runtime import apply, packed_layers, place_empty
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    sample,
    scene_prompts,
)
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate

SCHEMES = (
    "uint4-c",
    "uint3-c",
    "int5-g32",
    "e2m1-g32",
    "nvfp4",
    "km2-c",
    "int8-c+a8",
    "uint4-c+a8",
    "uint4-c+a8t~balance30",
    "int4-g32+a8",
    "uint4-c+ae4m3",
    "keep+a8",
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@contextmanager
def watched(
    model: torch.nn.Module, names: Iterable[str]
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Layer -> its input, before anything is rounded, and its output, of what is run inside."""
    seen: dict[str, list[torch.Tensor]] = {}

    def before(name: str) -> Any:
        return lambda module, args, kwargs: (
            seen.setdefault(name, [(args[0] if args else next(iter(kwargs.values()))).clone()])
            and None
        )

    def after(name: str) -> Any:
        return lambda module, args, output: seen[name].append(output.clone())

    layers = {name: model.get_submodule(name) for name in names}
    handles = [
        x.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True)
        for name, x in layers.items()
    ]
    handles += [x.register_forward_hook(after(name)) for name, x in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def parity(options: argparse.Namespace) -> None:
    rows = []
    for name in zoo.NAMES:
        pipe = load_pipeline(zoo.folder(name))
        model = denoiser_of(pipe)
        [call] = record(pipe, scene_prompts(2, seed=0), Sampling(steps=2), bins=1)
        graph = extract(model, example_inputs(call, model))
        calibration = calibrate(model, graph, [call])
        full = run(model, call)
        for scheme in options.schemes:
            plan = Plan.uniform(graph, scheme)
            mine = copy.deepcopy(model)
            packed = apply(mine, plan, graph, QuantizedWeights(mine, graph, calibration))
            with (
                simulate(model, plan, graph, QuantizedWeights(model, graph, calibration)),
                watched(model, packed_layers(packed)) as seen,
            ):
                simulated = run(model, call)
            with torch.no_grad():
                worst = max(
                    float((packed.get_submodule(n)(v[0]) - v[1]).abs().max() / v[1].abs().max())
                    for n, v in seen.items()
                )
            noise = [
                float((y - full).square().sum() / full.square().sum())
                for y in (simulated, run(packed, call))
            ]
            bytes_ = sum(
                part.stored_bytes for x in packed_layers(packed).values() for part in x.weights
            )
            in_bytes = sum("cpu" in x.devices for x in packed_layers(packed).values())
            planned = (
                sum(
                    plan.layers[n].stored_bits(
                        graph.layer(n).weight_shape,
                        graph.layer(n).channel_axis,
                        graph.layer(n).parts,
                    )
                    for n in packed_layers(packed)
                )
                / 8
            )
            row = {
                "model": name,
                "scheme": scheme,
                "layers": len(seen),
                "multiplied as bytes": in_bytes,
                "worst layer": worst,
                "noise simulated": noise[0],
            }
            rows.append(row | {"noise packed": noise[1], "bytes / plan's": bytes_ / planned})
            print(rows[-1], flush=True)
    publish(
        str(_named("parity")), rows, title="runtime: packed layers against simulated ones", seed=0
    )


def four_bits(graph: OpGraph) -> Plan:
    """4.0 stored bits or less: int4 a channel, and int3 in as many layers, the smallest first, as
    it takes.
    """
    chosen = {layer.name: "int4-c" if layer.quantizable else "keep" for layer in graph}
    for layer in sorted(graph.quantizable, key=lambda x: x.weights):
        plan = Plan.make(graph, chosen)
        if plan.achieved.average_bits <= 4.0:
            return plan
        chosen[layer.name] = "int3-c"
    return Plan.make(graph, chosen)


def memory(options: argparse.Namespace) -> None:
    from qsearch.graphs.families import cards

    rows = []
    for name in (*zoo.NAMES, "pixart-alpha", "sdxl"):
        if name in zoo.NAMES:
            pipe = load_pipeline(zoo.folder(name))
            model = denoiser_of(pipe)
            [call] = record(pipe, scene_prompts(2, seed=0), Sampling(steps=2), bins=1)
            graph = extract(model, example_inputs(call, model), name=name)
        else:
            model, inputs = cards.load(name)
            graph = extract(model, inputs, name=name)
        plan = four_bits(graph)
        full = sum(2 * p.numel() for p in model.parameters())
        place_empty(
            model,
            {n: (s,) for n, s in plan.layers.items() if s != KEEP},
            {},
            {layer.name: layer.parts for layer in graph},
        )
        packed = sum(
            part.stored_bytes for layer in packed_layers(model).values() for part in layer.weights
        )
        kept = sum(2 * layer.weights for layer in graph if plan.layers[layer.name] == KEEP)
        rest = sum(2 * p.numel() for p in model.parameters())
        row = {
            "model": name,
            "stored bits": plan.achieved.average_bits,
            "MB in 16 bits": full / 1e6,
            "MB packed": (packed + rest) / 1e6,
        }
        rows.append(
            row
            | {
                "times smaller": full / (packed + rest),
                "layers' bytes / plan's": (packed + kept) / plan.achieved.bytes,
            }
        )
        print(rows[-1], flush=True)
    publish(
        str(_named("memory")),
        rows,
        title="runtime: bytes in memory at 4.0 stored bits, biases and norms included at 16 bits",
        seed=0,
    )


@torch.no_grad()
def pipelines(options: argparse.Namespace) -> None:
    if options.inside:
        hand_back(raced(options))
        return
    rows = [
        {"level": level, **row}
        for level in options.levels
        for row in found_at(level, __file__, sys.argv[1:])
    ]
    publish(
        str(_named("pipelines")),
        rows,
        title=f"runtime: {options.captions} pictures, two steps, end to end",
        seed=0,
        extra={"threads": options.threads, "clock": options.clock},
    )


def raced(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a pipeline of the zoo and contender, in this process."""
    from qsearch_kernels import bench

    torch.set_num_threads(options.threads)
    rows = []
    for name in zoo.NAMES:
        pipes: dict[str, Any] = {"fp32": load_pipeline(zoo.folder(name))}
        [call] = record(pipes["fp32"], scene_prompts(2, seed=0), Sampling(steps=2), bins=1)
        graph = extract(
            denoiser_of(pipes["fp32"]), example_inputs(call, denoiser_of(pipes["fp32"]))
        )
        calibration = calibrate(denoiser_of(pipes["fp32"]), graph, [call])
        pipes["bf16"] = load_pipeline(zoo.folder(name)).to(torch.bfloat16)
        for scheme in ("int8-c+a8", "uint4-c+a8", "uint4-c"):
            pipes[scheme] = load_pipeline(zoo.folder(name))
            mine = denoiser_of(pipes[scheme])
            apply(
                mine,
                Plan.uniform(graph, Scheme.parse(scheme)),
                graph,
                QuantizedWeights(mine, graph, calibration),
            )
        taken = bench.race(
            {
                kind: partial(
                    sample,
                    pipe,
                    scene_prompts(options.captions, seed=1),
                    Sampling(steps=2, batch=options.captions),
                )
                for kind, pipe in pipes.items()
            },
            options.seconds,
            clock=CLOCKS[options.clock],
        )
        middle = {kind: statistics.median(times) for kind, times in taken.items()}
        for kind, times in taken.items():
            row = {
                "model": name,
                "denoiser": kind,
                "seconds": middle[kind],
                "fastest": min(times),
                "slowest": max(times),
            }
            rows.append(
                row
                | {
                    "x fp32": middle["fp32"] / middle[kind],
                    "x bf16": middle["bf16"] / middle[kind],
                    "runs": len(times),
                }
            )
    return rows


def _named(part: str) -> Path:
    return Path(__file__).with_name(f"runtime-{part}.py")


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("parity", "memory", "pipelines"), required=True)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=["native"])
    parser.add_argument("--inside", choices=list(LEVELS), help=argparse.SUPPRESS)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the cores' own seconds, for a machine that others use too",
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    {"parity": parity, "memory": memory, "pipelines": pipelines}[options.part](options)


if __name__ == "__main__":
    main()
