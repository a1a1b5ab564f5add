"""How fast is a whole denoiser, packed, beside full precision, `torch.compile` and other tools?
True shapes, random weights, one call, in one run.

    python notebooks/figures/denoisers.py pixart-alpha sdxl --resolution 256 [--device cuda --batch
    2 --mode reduce-overhead]

A race a card (`qsearch bench CARD --whole`): medians of calls in turn. Adds to denoisers.json the
rows of every card, resolution and device that was raced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from figure import publish

from qsearch.stages.bench import BenchSettings, race


def main() -> None:
    """Race, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cards", nargs="+")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--schemes", nargs="+", default=["int8-c+a8", "uint4-c+a8", "uint4-c"])
    parser.add_argument("--against", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--mode", default="default", help="of torch.compile; none = eager alone")
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    path = Path(__file__).with_suffix(".json")
    device = (
        torch.cuda.get_device_name()
        if torch.device(o.device).type == "cuda"
        else f"{o.threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for card in o.cards:
        asked = BenchSettings(
            schemes=o.schemes,
            device=o.device,
            seconds=o.seconds,
            resolution=o.resolution,
            batch=o.batch,
            against=o.against,
            mode=o.mode,
        )
        made = race(card, asked)
        here = {
            "card": card,
            "pixels": o.resolution or "native",
            "batch": o.batch,
            "device": device,
        }
        kept = (
            [r for r in json.loads(path.read_text())["rows"] if {k: r[k] for k in here} != here]
            if path.exists()
            else []
        )
        rows = [*kept, *({**here, **row} for row in made)]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        publish(
            __file__,
            [{key: row.get(key, "") for key in columns} for row in rows],
            title="whole denoisers, one call",
            seed=0,
        )


if __name__ == "__main__":
    main()
