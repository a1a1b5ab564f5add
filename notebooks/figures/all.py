"""Every figure's JSON again, cheapest first, each by the one command that is written here.

    python notebooks/figures/all.py [NAME ...] [--minutes 60] [--list]

`NAME`: of JSONs without the ending; all where left out. What the present commit has made by its own
command is left as it is, so that a call that was interrupted, or that `--minutes` ended, goes on
where it was. A figure that fails is named at the end, and the others are made. `--list` prints the
commands with the minutes that each takes on one thread of a core with AVX2 (Zen 3), about; what it
needs besides, a GPU or trained rivals, is left out where it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from figure import commit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: trained rivals of the multistage model (`python -m qsearch.zoo.train NAME --out FOLDER`)
RIVALS = "runs/zoo/out"
REFERENCE = "../shared/reference"
_PLACES = re.compile(r" --(?:folder|work|keep|rivals|reference) \S+")


@dataclass(frozen=True)
class Made:
    """A JSON: the words after the script, minutes, a path that must be there."""

    name: str
    words: str
    minutes: float
    needs: str = ""

    @property
    def command(self) -> str:
        """As `figure.publish` writes it down."""
        return f"python notebooks/figures/{self.words}"


_INPUTS = "keep+a8,keep+a6,keep+a4,keep+ae4m3,uint8-c+a8,uint4-c+a8"
FIGURES = (
    Made("rooms", "rooms.py", 0.2),
    Made("step_log", "step_log.py", 1),
    Made("plans", "plans.py", 1, REFERENCE),
    Made("sparse_attention-memory", "sparse_attention.py --part memory", 1),
    Made("runtime-parity", "runtime.py --part parity --schemes uint4-c int8-c+a8 nvfp4", 2),
    Made("metrics", "metrics.py", 2),
    Made("noise_by_hand", "noise_by_hand.py", 3),
    Made("formats", "formats.py", 4),
    Made("products-avx2", "products.py --seconds 0.4 --threads 1 --levels native --name avx2", 4),
    Made(
        "products-avx2-2", "products.py --seconds 0.3 --threads 2 --levels native --name avx2-2", 4
    ),
    Made("main_job", "main_job.py --kills 0", 5),
    Made("main_job-video", "main_job.py --kills 0 --models scenes-video --name video", 6),
    Made("shell", "shell.py", 5),
    Made("first_contact", "first_contact.py", 5),
    Made("codes_limit", "codes_limit.py", 6),
    Made("codes_speed", "codes_speed.py --repeats 5 --tiles 100", 6),
    Made("lora", "lora.py", 7),
    Made("sparse_attention-times", "sparse_attention.py --part times", 8),
    Made("ecar_plans", "ecar_plans.py --samples 256 --steps 12 --probes 16", 8),
    Made("gates", "gates.py", 10),
    Made("census", "census.py", 12),
    Made("original_names", "original_names.py", 15),
    Made("zoo", "zoo.py", 20),
    Made(
        "probes-scenes-ecar-trajectory",
        "probes.py scenes-ecar --trajectory --steps 12 --samples 8 --probes 64 --batch 1 --plans 0 "
        "--metrics sqnr --schemes uint2-c,uint3-c,uint4-c,uint8-c",
        20,
    ),
    Made("probes-scenes-dit", "probes.py scenes-dit --batch 1 --samples 8", 20),
    Made("probes-scenes-unet", "probes.py scenes-unet --batch 1 --samples 8", 30),
    *(
        Made(
            f"probes-{model}-activations",
            f"probes.py {model} --batch 1 --samples 8 --plans 0 --schemes {_INPUTS} --name "
            "activations",
            20,
        )
        for model in ("scenes-dit", "scenes-unet")
    ),
    *(
        Made(
            f"probes-{model}-trajectory",
            f"probes.py {model} --batch 1 --samples 4 --steps 20 --trajectory",
            40,
        )
        for model in ("scenes-dit", "scenes-unet")
    ),
    Made("comfyui_formats", "comfyui_formats.py", 25),
    Made("ecar", f"ecar.py --rivals {RIVALS}", 30, RIVALS),
    Made("cluster-trials", "cluster.py trials", 30),
    Made("cluster-workers", "cluster.py workers", 30),
    Made("whole_pipeline", "whole_pipeline.py", 30),
    Made("main_job_pairs", "main_job_pairs.py --pairs 2", 30),
    Made("methods", "methods.py --samples 32", 40),
    Made("tools", "tools.py", 40),
    Made("codes_layers", "codes_layers.py --states 12", 40),
    Made("zoo_video", "zoo_video.py", 16),
    Made(
        "probes-scenes-video",
        "probes.py scenes-video --bins 2 --samples 2 --batch 1 --probes 64 --plans 0 "
        "--metrics noise,sqnr,temporal,alignment,motion --schemes uint2-c,uint3-c,uint4-c,uint8-c",
        15,
    ),
    Made("video-methods", "video.py --part methods", 25),
    Made("video-decoupled", "video.py --part decoupled", 9),
    Made("video-ranges", "video.py --part ranges", 10),
    Made("video-reliability", "video.py --part reliability", 5),
    Made("video-surrogates", "video.py --part surrogates", 20),
    *(
        Made(
            f"attention_plans-{model}-{part}",
            f"attention_plans.py --zoo {model} --part {part}{more}",
            minutes,
        )
        for model, captions in (("scenes-dit", 8), ("scenes-video", 3))
        for part, more, minutes in (
            ("price", f" --captions {captions} --probes 8", 20),
            ("sweep", f" --captions {captions} --cells 64", 60),
            ("equal", f" --captions {captions}", 60),
            ("mixed", f" --captions {captions} --probes 8 --plans 100", 60),
        )
    ),
    *(
        Made(
            f"sparse_attention-methods-{model}",
            f"sparse_attention.py --part methods --zoo {model} --captions {captions}",
            60,
        )
        for model, captions in (("scenes-dit", 16), ("scenes-video", 8))
    ),
    Made("sparse_attention-video", "sparse_attention.py --part video", 30),
    Made("sparse_attention-pixart", "sparse_attention.py --part pixart", 30),
    Made("interrupts", "interrupts.py", 90),
    Made("ranges", "ranges.py --workers 1", 90),
    *(
        Made(f"arena-{model}", f"arena.py {model}{more}", minutes)
        for model, more, minutes in (
            ("scenes-dit", "", 50),
            ("scenes-unet", "", 60),
            ("scenes-ecar", "", 100),
            ("scenes-video", " --seeds 2 --captions 4 --bits 4 6", 90),
        )
    ),
    Made("codes_plans-scenes-dit-weights", "codes_plans.py --zoo scenes-dit --part weights", 120),
    Made("codes_plans-scenes-dit-inputs", "codes_plans.py --zoo scenes-dit --part inputs", 120),
    Made("explanations", "explanations.py --folder runs/campaign", 120, "runs/campaign"),
    Made("surrogates", "surrogates.py --folder runs/campaign", 120, "runs/campaign"),
    Made("graphs", "graphs.py", 20, REFERENCE),
    Made("memory", "memory.py sdxl", 10),
    Made("post_gelu", "post_gelu.py --layers 4 --samples 4 --bits 8 6 4", 10),
    Made("products", "products.py --seconds 0.4", 8),
    Made("products-2", "products.py --seconds 0.4 --threads 2 --name 2", 8),
    Made("quick", "quick.py --folder runs/sizes", 10, "runs/sizes"),
    Made("reconstruction", "reconstruction.py --blocks 1 --samples 2 --steps 80 --bits 4 8", 20),
    Made(
        "rounding",
        "rounding.py --layers 4 --samples 4 --steps 200 --rates 3e-3 1e-2 3e-2 1e-1 3e-1",
        20,
    ),
    Made("runtime-memory", "runtime.py --part memory", 10),
    Made("runtime-pipelines", "runtime.py --part pipelines --levels native avx2", 20),
    Made("compiled", "compiled.py", 30),
    *(Made(f"compiled-{arch}", "compiled.py --arch 120 100 89 80", 60) for arch in (100, 120)),
    Made(
        "denoisers",
        "denoisers.py pixart-alpha --resolution 256 --levels avx2 native --mode none --seconds 6",
        15,
    ),
    Made(
        "denoisers-sdxl",  # full precision in fp32 leaves 22 GiB no room for more contenders
        "denoisers.py sdxl --resolution 256 --levels avx2 native --mode none --seconds 6 "
        "--schemes int8-c+a8 --against torchao-w8a8 sdnq-w8a8 --name sdxl",
        20,
    ),
    Made("sizes", "sizes.py profile sdxl", 120),
)


def bare(command: str) -> str:
    """A command without the places of its work, which change no number."""
    return _PLACES.sub("", f"{command} ").strip()


def wrong(made: Made, now: str = "") -> str:
    """What is wrong with a JSON: it is missing, of another command, of no commit, or not of commit
    `now` where one is given; "" if nothing is.
    """
    path = HERE / f"{made.name}.json"
    if not path.is_file():
        return "there is none"
    held = json.loads(path.read_text("utf-8"))
    if bare(str(held.get("command"))) != bare(made.command):
        return f"made by {held.get('command')}"
    found = held.get("commit")
    if not isinstance(found, str) or re.fullmatch("[0-9a-f]{7,40}", found) is None:
        return f"made of commit {found}"
    return "of another commit" if now not in ("", found) else ""


def main() -> int:
    """Make what is missing; the number of figures that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    known = {made.name: made for made in FIGURES}
    if unknown := set(options.names) - set(known):
        parser.error(f"no figure of the name {', '.join(sorted(unknown))}")
    chosen = [known[n] for n in options.names] or sorted(FIGURES, key=lambda made: made.minutes)
    now = commit()
    if options.list:
        for made in chosen:
            print(f"{made.minutes:6.1f} min  {made.command}  ({wrong(made, now) or 'made'})")
        return 0
    path = os.pathsep.join((".", "kernels", os.environ.get("PYTHONPATH", "")))
    began, failed = time.monotonic(), []
    for made in chosen:
        if time.monotonic() - began > 60 * options.minutes:
            break
        if not wrong(made, now):
            continue
        if made.needs and not (ROOT / made.needs).exists():
            print(f"{made.name}: left out, {made.needs} is not there")
            continue
        words = made.command.split()[1:]
        code = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False
        ).returncode
        if code:
            failed.append(f"{made.command} ended with {code}")
    print("\n".join(failed) or "no figure failed")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
