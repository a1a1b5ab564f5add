"""How fast is a whole denoiser, packed, beside full precision, `torch.compile` and other tools?
True shapes, random weights, one call, in one run.

    python notebooks/figures/denoisers.py pixart-alpha sdxl --resolution 256 [--levels native avx2]
    [--threads 1 --mode none --schemes int8-c+a8 --against fp32 torchao-w8a8 --seconds 3]
    python notebooks/figures/denoisers.py pixart-alpha --device cuda --batch 2
    --mode reduce-overhead --name cuda

A race a model (a card, a model of the zoo or a pipeline's folder) and level (levels.py; of CPUs),
each in a process of its own (`qsearch bench MODEL --whole`): medians of calls in turn. Written to
denoisers.json, or denoisers-NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from figure import publish
from levels import LEVELS, found_at, hand_back

from qsearch.stages.bench import BenchSettings, race
from qsearch_kernels import product_table

HERE = Path(__file__)


def main() -> None:
    """Race, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--resolution", type=int, help="of cards, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", default=["int8-c+a8", "uint4-c+a8", "uint4-c"])
    parser.add_argument("--against", nargs="*", help="fp32, other tools; all if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--mode", default="default", help="of torch.compile; none = eager alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=["native"])
    parser.add_argument("--name", default="", help="of this device")
    parser.add_argument("--inside", choices=list(LEVELS), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.inside:
        torch.set_num_threads(o.threads)
        asked = BenchSettings(
            schemes=o.schemes,
            device=o.device,
            seconds=o.seconds,
            resolution=o.resolution,
            batch=o.batch,
            against=o.against,
            mode=o.mode,
        )
        cuda = torch.device(o.device).type == "cuda"
        device = torch.cuda.get_device_name() if cuda else product_table.core()["core"]
        [model] = o.models
        hand_back([device, race(model, asked, say=lambda text: print(text, file=sys.stderr))])
        return
    rows, words = [], sys.argv[1:]
    for model in o.models:  # they come first, and an option may say the same word
        words.remove(model)
    for model in o.models:
        for level in o.levels:
            device, made = found_at(level, __file__, [model, *words])
            here = {"model": model, "level": level, "device": device, "threads": o.threads}
            rows += [{**here, **row} for row in made]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    publish(
        str(HERE.with_name(f"denoisers-{o.name}.py") if o.name else HERE),
        [{key: row.get(key, "") for key in columns} for row in rows],
        title="whole denoisers, one call",
        seed=0,
    )


if __name__ == "__main__":
    main()
