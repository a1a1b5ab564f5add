"""The zoo at full precision: alignment and Fréchet distance on held-out captions, beside the
ceiling that judge and VAE set.

    python notebooks/figures/zoo.py [--samples 512] [--steps 20] [--guidance 4.0]

Writes zoo.json and a contact sheet a pipeline (zoo-NAME.png) beside this file, and scores.json into
the pipeline's folder.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from figure import publish
from PIL import Image, ImageDraw

from qsearch import zoo
from qsearch.measure.metrics.frechet import frechet
from qsearch.measure.pipelines import Sampling, decode, load_pipeline, sample, scene_prompts
from qsearch.zoo import judge
from qsearch.zoo.scenes import describe, draw_scenes, render


def scores(network: judge.Judge, pictures: torch.Tensor, captions: Any) -> dict[str, Any]:
    """Mean alignment with its standard error, hits by attribute, and Fréchet distance."""
    value = judge.alignment(network, pictures, captions)
    by = judge.by_attribute(network, pictures, captions)
    mean_of_kinds = sum(by.values()) / len(by)
    return {
        "alignment": float(value.mean()),
        "±": float(value.std() / math.sqrt(len(value))),
        "mean of attributes": mean_of_kinds,
        **{k: by[k] for k in ("colour", "shape", "size", "texture", "layout", "background")},
        "Fréchet": frechet(pictures),
    }


def contact_sheet(path: Path, pictures: torch.Tensor, captions: Any) -> None:
    """32 pictures, two times their size, each over its caption."""
    tiles = ((pictures[:32].clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (8 * 150, 4 * 190), "white")
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = i % 8 * 150, i // 8 * 190
        sheet.paste(
            Image.fromarray(tile).resize((128, 128), Image.Resampling.NEAREST), (x + 11, y + 6)
        )
        words, line, row = captions[i].text.split(), "", 0
        for word in [*words, ""]:
            if not word or len(line) + len(word) > 23:
                draw.text((x + 8, y + 137 + 10 * row), line, fill="black")
                line, row = "", row + 1
            line += word + " "
    sheet.save(path)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=zoo.NAMES)
    options = parser.parse_args()
    here, network = Path(__file__).parent, judge.load_judge()
    generator = torch.Generator().manual_seed(options.seed + 99)
    scenes = draw_scenes(options.samples, generator, held_out=True)
    captions, real = describe(scenes, generator), render(scenes)
    rows: list[dict[str, Any]] = [
        {"pictures": "rendered (ceiling of the judge)", **scores(network, real, captions)}
    ]
    for name in options.models:
        pipe = load_pipeline(zoo.folder(name))
        if name == options.models[0]:
            with torch.no_grad():
                latents = (
                    torch.cat([pipe.vae.encode(x).latent_dist.mean for x in real.split(64)])
                    * pipe.vae.config.scaling_factor
                )
            rows.append(
                {
                    "pictures": "rendered, through the VAE",
                    **scores(network, decode(pipe, latents), captions),
                }
            )
        prompts = scene_prompts(options.samples, options.seed)
        pictures = decode(
            pipe, sample(pipe, prompts, Sampling(options.steps, options.guidance, options.seed, 64))
        )
        row = {"pictures": name, **scores(network, pictures, prompts.captions)}
        rows.append(row)
        contact_sheet(here / f"zoo-{name}.png", pictures, prompts.captions)
        measured = {
            "samples": options.samples,
            "steps": options.steps,
            "guidance": options.guidance,
            "seed": options.seed,
            **row,
        }
        (zoo.folder(name) / "scores.json").write_text(
            json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    publish(
        __file__,
        rows,
        title=f"{options.samples} captions of held-out scenes, {options.steps} steps, guidance "
        f"{options.guidance}",
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
