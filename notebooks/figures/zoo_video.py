"""The zoo's video pipeline at full precision: alignment, motion, Fréchet distance.

    python notebooks/figures/zoo_video.py [--samples 256] [--steps 20] [--guidance 4.0]

Beside the ceiling that judge and VAE set. Writes zoo_video.json, two sheets of film strips
(zoo-scenes-video.png, the first captions; zoo-scenes-video-worst.png, the least aligned) beside
this file, and scores.json into the pipeline's folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figure import publish
from PIL import Image, ImageDraw
from torch import Tensor

from qsearch import zoo
from qsearch.zoo import video_judge
from qsearch.zoo.moving_scenes import FRAMES, OF_MOTION, RESOLUTION, describe, draw_clips, render
from qsearch.zoo.scenes import Caption

ATTRIBUTES = ("colour", "shape", "size", "layout", "background", *OF_MOTION)
#: rendered clips that the Fréchet distance compares with
REAL = 512
SHOWN = (0, 2, 4, 6, 8, 10, 12, 14)


def with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return mean, spread / math.sqrt(len(values))


def bootstrap(
    hits: list[dict[str, list[bool]]], names: Sequence[str], rounds: int = 500
) -> tuple[float, float]:
    """Mean share of hits over the attributes `names`, and its standard error by bootstrap."""
    found = torch.tensor([[sum(h.get(n, [])) for n in names] for h in hits], dtype=torch.float)
    asked = torch.tensor([[len(h.get(n, [])) for n in names] for h in hits], dtype=torch.float)
    mean = float((found.sum(0) / asked.sum(0)).mean())
    index = torch.randint(
        len(hits), (rounds, len(hits)), generator=torch.Generator().manual_seed(0)
    )
    again = (found[index].sum(1) / asked[index].sum(1).clamp(min=1)).mean(1)
    return mean, float(again.std())


@torch.no_grad()
def features(network: video_judge.VideoJudge, clips: Tensor) -> Tensor:
    """The judge's features [N, 128], in double precision."""
    return torch.cat([network.embed(c) for c in clips.split(32)]).double()


def real_features(network: video_judge.VideoJudge) -> Tensor:
    """Features of `REAL` rendered clips, drawn and read a few at a time."""
    clips = draw_clips(REAL, torch.Generator().manual_seed(777))
    parts = [features(network, render(clips[i : i + 32])) for i in range(0, REAL, 32)]
    return torch.cat(parts)


def frechet(ours: Tensor, real: Tensor) -> float:
    """Fréchet distance between two sets of features."""
    (m1, c1), (m2, c2) = ((x.mean(0), x.T.cov()) for x in (ours, real))
    root = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root)


def scores(
    network: video_judge.VideoJudge, clips: Tensor, captions: Sequence[Caption], real: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """One row of the table, and the alignment of every clip."""
    hits = video_judge.clip_hits(network, clips, captions)
    each = [sum(map(sum, h.values())) / sum(map(len, h.values())) for h in hits]
    row: dict[str, Any] = dict(zip(("alignment", "±"), with_error(each), strict=True))
    row |= dict(zip(("mean of attributes", "± "), bootstrap(hits, ATTRIBUTES), strict=True))
    row |= dict(zip(("mean of motion", "±  "), bootstrap(hits, OF_MOTION), strict=True))
    row |= {n: bootstrap(hits, (n,), 2)[0] for n in ATTRIBUTES}
    row["per frame"] = float(video_judge.frame_alignment(network, clips, captions).mean())
    row["Fréchet"] = frechet(features(network, clips), real)
    return row, torch.tensor(each)


def strips(path: Path, clips: Tensor, labels: Sequence[str]) -> None:
    """Film strips of every second frame of clips [N, 3, T, H, W], each under its label."""
    side, top = RESOLUTION * 3 // 2, 14
    sheet = Image.new("RGB", (len(SHOWN) * (side + 2), len(clips) * (side + top)), "white")
    draw = ImageDraw.Draw(sheet)
    frames = ((clips.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    for i, label in enumerate(labels):
        draw.text((3, i * (side + top) + 1), label, fill="black")
        for j, frame in enumerate(SHOWN):
            tile = Image.fromarray(frames[i, frame]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (j * (side + 2), i * (side + top) + top))
    sheet.save(path)


def paint(pipe: Any, texts: list[str], options: argparse.Namespace) -> Tensor:
    """Clips [N, 3, 15, 64, 64] in [-1, 1], each from a noise of its own."""
    parts = []
    for i in range(0, len(texts), options.batch):
        some = texts[i : i + options.batch]
        noise = [
            torch.Generator().manual_seed(options.seed * 100_003 + i + j) for j in range(len(some))
        ]
        call = {
            "num_frames": FRAMES,
            "height": RESOLUTION,
            "width": RESOLUTION,
            "max_sequence_length": options.words,
        }
        made = pipe(
            some,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=noise,
            output_type="pt",
            **call,
        ).frames
        parts.append(made.transpose(1, 2) * 2 - 1)
        print(f"{min(i + options.batch, len(texts))} of {len(texts)} clips", flush=True)
    return torch.cat(parts).float()


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--words",
        type=int,
        default=zoo.CLIP_WORDS,
        help="length that prompts are padded to (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, default=zoo.folder("scenes-video"))
    parser.add_argument(
        "--judge", type=Path, help="folder of the judge's weights (default: the package's)"
    )
    parser.add_argument("--dry", type=Path, help="write everything into this folder instead")
    options = parser.parse_args()
    from diffusers import DiffusionPipeline

    network = video_judge.load_video_judge(options.judge)
    generator = torch.Generator().manual_seed(options.seed + 99)
    clips = draw_clips(options.samples, generator, held_out=True)
    captions = describe(clips, generator)
    drawn = torch.cat([render(clips[i : i + 32]) for i in range(0, len(clips), 32)])
    others = real_features(network)
    pipe = DiffusionPipeline.from_pretrained(options.folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    rows = [
        {"clips": "rendered (ceiling of the judge)", **scores(network, drawn, captions, others)[0]}
    ]
    with torch.no_grad():
        padded = torch.cat(
            [drawn, drawn[:, :, -1:].expand(-1, -1, 2, -1, -1)], 2
        )  # 17 = 1 + 4 + 4 + 4 + 4 frames
        back = [
            pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean[:, :, :8]).sample
            for x in padded.split(16)
        ]
    rows.append(
        {
            "clips": "rendered, through the VAE",
            **scores(network, torch.cat(back), captions, others)[0],
        }
    )
    made = paint(pipe, [c.text for c in captions], options)
    row, each = scores(network, made, captions, others)
    rows.append({"clips": "scenes-video", **row})

    here = options.dry or Path(__file__).parent
    here.mkdir(parents=True, exist_ok=True)
    labels = [f"{mark:.2f}  {c.text}" for mark, c in zip(each.tolist(), captions, strict=True)]
    worst = each.argsort()[:12].tolist()
    strips(here / "zoo-scenes-video.png", made[:12], labels[:12])
    strips(here / "zoo-scenes-video-worst.png", made[worst], [labels[i] for i in worst])
    measured = {k: getattr(options, k) for k in ("samples", "steps", "guidance", "seed")} | rows[-1]
    target = (options.dry or options.folder) / "scores.json"
    target.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sampling = f"{options.steps} steps, guidance {options.guidance}"
    title = f"{options.samples} captions of held-out clips, {sampling}"
    script = str(here / "zoo_video.py")
    publish(script, rows, title=title, seed=options.seed)


if __name__ == "__main__":
    main()
