"""What does a probe of a real model take, in memory and time? Shapes of a card, random weights, one
probe of one step on the CPU.

    python notebooks/figures/memory.py pixart-alpha [--resolution 256 --dtype float32 --schemes
    uint4-c]

Blocks are checkpointed and quantized weights made anew for each layer, so that the peak should be
the weights, what the largest block keeps while it is computed again, and what is kept between
blocks. Counted is the process's resident memory above what it had before there were weights (Linux:
VmHWM of /proc/self/status). Adds a row to memory.json for every card that was measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from figure import publish
from torch import nn
from torch.utils import checkpoint

from qsearch.choices.quantization import quantize
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.graphs.families import cards
from qsearch.measure import gradients
from qsearch.measure.estimation import EstimationTask
from qsearch.measure.memory import saved_activation_bytes, weight_bytes
from qsearch.measure.observation import StepObservation
from qsearch.measure.pipelines import Call
from qsearch.race.denoisers import filled, numbers

GIB = 2**30


def resident(name: str = "VmRSS") -> int:
    """Bytes that the kernel counts as this process's own."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def warm_up(dtype: torch.dtype) -> None:
    """Load the libraries' code, which is the process's own as well, by what is done later, in
    small.
    """
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Flatten(2),
        nn.LayerNorm(36),
        nn.Linear(36, 36),
        nn.GELU(),
    ).to(dtype)
    made = model(torch.randn(2, 8, 8, 8, dtype=dtype))
    nn.functional.scaled_dot_product_attention(made, made, made).sum().backward()
    quantize(torch.randn(64, 64), Scheme.parse("uint4-c"))


class Segments:
    """A checkpoint function for diffusers that counts what the largest segment keeps."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {x.untyped_storage().data_ptr() for x in model.parameters()}
        self.largest = 0

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in self.own:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made = block(*args, **kwargs)
        self.largest = max(self.largest, sum(kept.values()))
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x: x.detach().requires_grad_(), made
        )


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", choices=cards.names())
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--schemes", default="uint4-c")
    o = parser.parse_args()
    if (
        "MALLOC_MMAP_THRESHOLD_" not in os.environ
    ):  # else the C library keeps what was freed, and it counts as the process's own
        os.execve(
            sys.executable,
            [sys.executable, *sys.argv],
            os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
        )
    dtype = getattr(torch, o.dtype)
    model, inputs = cards.load(o.card, resolution=o.resolution)
    graph = extract(model, inputs, name=o.card)
    warm_up(dtype)
    before = resident()
    model = filled(model, dtype)
    call = Call((), numbers(inputs, dtype), 0)
    switch: Any = model
    segments = Segments(model)
    switch.enable_gradient_checkpointing(segments)
    saved_activation_bytes(model, call)
    switch.enable_gradient_checkpointing(
        lambda block, *args: checkpoint.checkpoint(block, *args, use_reentrant=False)
    )
    between = saved_activation_bytes(model, call)
    gradients.KEPT = 0
    observation = StepObservation(model, call, 0, ("noise",))
    task = EstimationTask(
        model,
        graph,
        tuple(Scheme.parse(s) for s in o.schemes.split(",")),
        (observation,),
        ("noise",),
        probes=2,
    )
    contraction = gradients.Contraction(task)
    _ = observation.scale
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    began, cpu = time.monotonic(), time.process_time()
    with contraction.watching():
        made = observation.features()["noise"]
        shares = contraction.of(made, [0], observation, retain=False)
    seconds, spent = time.monotonic() - began, time.process_time() - cpu
    peak, weights = resident("VmHWM") - before, weight_bytes(model)
    row = {
        "card": o.card,
        "type": o.dtype,
        "pixels": o.resolution,
        "layers": len(graph.quantizable),
        "moved": int((shares != 0).any((0, 1)).sum()),
        "weights, GiB": weights / GIB,
        "largest block, GiB": segments.largest / GIB,
        "between blocks, GiB": between / GIB,
        "peak, GiB": peak / GIB,
        "peak / (weights + block)": peak / (weights + segments.largest + between),
        "CPU s a probe": spent,
        "s": seconds,
    }
    path = Path(__file__).with_suffix(".json")
    rows = (
        [
            r
            for r in json.loads(path.read_text())["rows"]
            if (r["card"], r["type"], r["pixels"]) != (o.card, o.dtype, o.resolution)
        ]
        if path.exists()
        else []
    )
    publish(__file__, [*rows, row], title="one probe of one step, checkpointed", seed=0)


if __name__ == "__main__":
    main()
