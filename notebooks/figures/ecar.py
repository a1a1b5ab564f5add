"""Multistage flow against its rivals: alignment and Fréchet distance over counted FLOPs.

    python notebooks/figures/ecar.py --rivals FOLDER [--models NAME ...] [--steps 6 12 24]

`FOLDER` holds the trained rivals (`python -m qsearch.zoo.train NAME --out FOLDER`), and scenes-ecar
too where it is compared as it was after as many steps; what is not there is the package's. Writes
ecar.json and ecar.png beside this file and scores.json into the folder of scenes-ecar. Rows that
ecar.partial.json has already, of the same weights, are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from figure import publish
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import contact_sheet

from qsearch import zoo
from qsearch.measure.metrics.frechet import REAL, REAL_SEED
from qsearch.measure.pipelines import Sampling, decode, load_pipeline, sample, scene_prompts
from qsearch.zoo import judge
from qsearch.zoo.ecar.pipeline import EcarPipeline
from qsearch.zoo.scenes import draw_scenes, render

HERE = Path(__file__).parent
#: name -> folder of the weights, and what is added between two stages
MODELS = {
    "A single stage": ("ecar-single", "corrected"),
    "B full stages": ("ecar-full", "corrected"),
    "C multistage (ours)": ("scenes-ecar", "corrected"),
    "D ours, white renoise": ("scenes-ecar", "white"),
    "D ours, no renoise": ("scenes-ecar", "none"),
    "scenes-dit": ("scenes-dit", ""),
}
GROUPS = 16  # of the jackknife
SHOWN_STEPS = 12  # of the contact sheet and of scores.json


@dataclass(frozen=True)
class Row:
    """One model at one number of steps; errors are standard errors, FLOPs those of one picture."""

    model: str
    steps: int
    trained: int
    alignment: float
    alignment_error: float
    attributes: float
    frechet: float
    frechet_error: float
    gflops: float
    flow_gflops: float
    seconds: float
    weights: str


def load(name: str, rivals: Path) -> tuple[Any, Path]:
    """A pipeline in fp32, and its folder: among the rivals where it is there, else in the
    package.
    """
    folder = rivals / name.replace("-", "_")
    if not folder.is_dir():
        folder = zoo.folder(name)
    if name == "scenes-dit":
        return load_pipeline(folder), folder
    pipe = EcarPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


def fingerprint(folder: Path) -> str:
    """Twelve digits that tell these weights from others."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/diffusion_pytorch_model.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def embed(network: judge.Judge, pictures: Tensor) -> Tensor:
    """The judge's features [N, 128] of pictures in [-1, 1], rounded to bytes as in a file."""
    whole = ((pictures / 2 + 0.5).clamp(0, 1) * 255).byte().float() / 127.5 - 1
    with torch.no_grad():
        return torch.cat([network.embed(x) for x in whole.split(256)]).double()


def distance(features: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features [N, d]."""
    a, b = torch.cov(features.mT), torch.cov(real.mT)
    both = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    gap = (features.mean(0) - real.mean(0)).square().sum()
    return float(gap + a.trace() + b.trace() - 2 * both)


def jackknife(features: Tensor, real: Tensor) -> float:
    """Standard error of `distance`: one of `GROUPS` parts of the features left out at a time."""
    part = torch.arange(len(features)) % GROUPS
    without = torch.tensor([distance(features[part != g], real) for g in range(GROUPS)])
    return float(((GROUPS - 1) * without.var(unbiased=False)).sqrt())


def floor(options: argparse.Namespace, real: Tensor) -> float:
    """The distance that as many rendered scenes have: what a perfect model would reach."""
    generator = torch.Generator().manual_seed(options.seed + 99)
    scenes = draw_scenes(options.samples, generator, held_out=True)
    return distance(embed(judge.load_judge(), render(scenes)), real)


def flops(pipe: Any, sampling: Sampling) -> tuple[float, float]:
    """GFLOPs of one guided picture: of all networks before the VAE, and of the denoiser's steps."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)  # or the counter looks for gradients that are not there
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        sample(pipe, scene_prompts(1, 0), sampling)
    by = counter.get_flop_counts()
    steps = "EcarFlow2DModel" if isinstance(pipe, EcarPipeline) else type(pipe.transformer).__name__
    return counter.get_total_flops() / 1e9, sum(by[steps].values()) / 1e9


def measure(name: str, steps: int, options: argparse.Namespace, real: Tensor) -> Row:
    """Sample, decode, judge, count and time one model."""
    folder_name, renoise = MODELS[name]
    pipe, folder = load(folder_name, options.rivals)
    if renoise:
        pipe.scheduler.register_to_config(renoise=renoise)
    prompts = scene_prompts(options.samples, options.seed)
    sampling = Sampling(steps, options.guidance, options.seed, 64)
    total, flow = flops(pipe, sampling)
    network = judge.load_judge()
    pictures = decode(pipe, sample(pipe, prompts, sampling))
    aligned = judge.alignment(network, pictures, prompts.captions)
    by = judge.by_attribute(network, pictures, prompts.captions)
    features = embed(network, pictures)
    if name.startswith("C") and steps == SHOWN_STEPS:
        contact_sheet(HERE / "zoo-scenes-ecar.png", pictures, prompts.captions)
        scores = {
            "samples": options.samples,
            "steps": steps,
            "guidance": options.guidance,
            "seed": options.seed,
            "pictures": folder_name,
            "alignment": float(aligned.mean()),
            "±": float(aligned.std() / math.sqrt(len(aligned))),
            "mean of attributes": sum(by.values()) / len(by),
            **by,
            "Fréchet": distance(features, real),
            "Fréchet of as many rendered scenes": floor(options, real),
        }
        text = json.dumps(scores, indent=2, ensure_ascii=False) + "\n"
        (folder / "scores.json").write_text(text, encoding="utf-8")
    return Row(
        model=name,
        steps=steps,
        trained=json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["steps"],
        alignment=float(aligned.mean()),
        alignment_error=float(aligned.std() / math.sqrt(len(aligned))),
        attributes=sum(by.values()) / len(by),
        frechet=distance(features, real),
        frechet_error=jackknife(features, real),
        gflops=total,
        flow_gflops=flow,
        seconds=math.nan,
        weights=fingerprint(folder),
    )


def times(rows: Sequence[Row], options: argparse.Namespace) -> list[float]:
    """Seconds a picture, 16 at a time: the median of three rounds in which the rows take turns.

    CPU time of this process, which on one thread is the wall time of a machine that nobody shares.
    """
    pipes = {name: load(MODELS[name][0], options.rivals)[0] for name in {r.model for r in rows}}
    prompts, rounds = scene_prompts(16, 0), []
    for _ in range(3):
        each = []
        for row in rows:
            sampling = Sampling(row.steps, options.guidance, 0, 16)
            began = time.process_time()
            sample(pipes[row.model], prompts, sampling)
            each.append((time.process_time() - began) / 16)
        rounds.append(each)
    return [sorted(found)[1] for found in zip(*rounds, strict=True)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Alignment and Fréchet distance over the FLOPs of a picture."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row.model for row in rows):
        own = sorted((r for r in rows if r.model == name), key=lambda r: r.gflops)
        x = [r.gflops for r in own]
        style: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 2, "label": name}
        left.errorbar(
            x, [100 * r.alignment for r in own], [100 * r.alignment_error for r in own], **style
        )
        right.errorbar(x, [r.frechet for r in own], [r.frechet_error for r in own], **style)
        for row in own:
            place = (row.gflops, 100 * row.alignment)
            left.annotate(str(row.steps), place, (3, 3), textcoords="offset points", fontsize=7)
    left.set_ylabel("alignment, %")
    right.set_ylabel("Fréchet distance (judge's features)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("GFLOPs a picture, guidance included")
        axes.grid(alpha=0.3)
    left.set_title("numbers: steps in all", fontsize=9)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what is missing, time all rows in one run, draw and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="*", default=[6, 12, 24])
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rivals", type=Path, default=Path("runs/zoo/out"))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--measure-only", action="store_true", help="neither time nor draw")
    parser.add_argument("--known-only", action="store_true", help="draw what is measured already")
    options = parser.parse_args()
    partial = HERE / "ecar.partial.json"
    known: dict[str, Any] = json.loads(partial.read_text()) if partial.exists() else {}
    scenes = draw_scenes(REAL, torch.Generator().manual_seed(REAL_SEED))
    real = embed(judge.load_judge(), render(scenes))
    rows = []
    for name in options.models:
        for steps in options.steps:
            weights = fingerprint(load(MODELS[name][0], options.rivals)[1])
            key = f"{name}, {steps} steps, {options.samples} samples, {options.guidance}, {weights}"
            if key not in known and options.known_only:
                continue
            if key not in known:
                known[key] = asdict(measure(name, steps, options, real))
                partial.write_text(json.dumps(known, indent=1))
                print(
                    {k: known[key][k] for k in ("model", "steps", "alignment", "frechet")},
                    flush=True,
                )
            rows.append(Row(**known[key]))
    if options.measure_only:
        return
    timed = zip(rows, times(rows, options), strict=True)
    rows = [Row(**{**asdict(row), "seconds": seconds}) for row, seconds in timed]
    draw(rows, HERE / "ecar.png")
    title = (
        f"{options.samples} held-out captions, guidance {options.guidance}; ± one standard error"
    )
    publish(__file__, [asdict(r) for r in rows], title=title, seed=options.seed)


if __name__ == "__main__":
    main()
