"""Every weight format at every granularity, at the bits that it really stores.

    python notebooks/figures/formats.py [--rows 512] [--data gauss student scenes-dit scenes-unet]
    [--schemes int4-g64 e2m1-g64 …] [--plain]

dB of signal over noise of the weights: Gaussian and Student-t (5 degrees of freedom) rows of 1152
columns, and all layers of the zoo's denoisers together, their noise added up. Each row of the table
also has `over uint`: its dB over asymmetric min-max integers at the same stored bits, taken from
the line through their own points (6.02 dB a bit beyond the last one). Its standard error is over
eight parts of the data. Writes formats.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figure import publish

from qsearch.choices.quantization import quantize
from qsearch.core.format_words import formats
from qsearch.core.scheme import Scheme

#: formats with a granularity of their own
BLOCKS = ("mxfp4", "mxfp6", "mxfp8", "nvfp4", "cb4")
GRANULARITIES = ("-t", "-c", "-g128", "-g64", "-g32", "-g16")
FOLDS = 8


def schemes() -> list[str]:
    """All formats at all granularities that they have, the searched and half-quadratic variants of
    the 4-bit ones besides; trellis codes are in codes_limit.py.
    """
    out = list(BLOCKS)
    for form in formats():
        if form not in ("keep", *BLOCKS) and not form.startswith("tcq"):
            grains = GRANULARITIES if not form.startswith("km") else ("-t", "-c", "-g128")
            out += [form + g for g in grains]
    out += [
        f"{form}{g}@search"
        for form in ("int4", "uint4", "e2m1", "e3m0", "int3", "uint3")
        for g in ("-c", "-g128", "-g64", "-g32")
    ]
    return out + [
        f"{form}{g}@hqq"
        for form in ("uint4", "uint3", "uint2")
        for g in ("-c", "-g128", "-g64", "-g32")
    ]


def weights(name: str, rows: int) -> list[tuple[str, torch.Tensor, int]]:
    """(layer, weight, axis of its channels) of a distribution, or of all linear layers and
    convolutions of a zoo denoiser.
    """
    dice = np.random.default_rng(0)
    if name == "gauss":
        return [(name, torch.from_numpy(dice.standard_normal((rows, 1152))).float(), 0)]
    if name == "student":
        return [(name, torch.from_numpy(dice.standard_t(5, (rows, 1152))).float(), 0)]
    from safetensors.torch import load_file

    from qsearch import zoo

    files = [
        path
        for path in zoo.folder(name).glob("*/diffusion_pytorch_model.safetensors")
        if path.parent.name in ("unet", "transformer")
    ]
    found = {key: value.float() for path in files for key, value in load_file(path).items()}
    return [
        (key, value, 0)
        for key, value in sorted(found.items())
        if key.endswith(".weight") and value.ndim >= 2
    ]


def noise(
    layers: list[tuple[str, torch.Tensor, int]], scheme: Scheme
) -> tuple[float, float, float]:
    """(stored bits a weight, dB of signal over noise, its standard error over `FOLDS` parts of the
    channels).
    """
    bits = total = 0
    power = np.zeros((FOLDS, 2))
    for name, weight, axis in layers:
        back = quantize(weight, scheme, axis=axis, layer=name).dequantize()
        bits, total = bits + scheme.stored_bits(weight.shape, axis), total + weight.numel()
        own, off = (
            t.movedim(axis, 0).flatten(1).square().sum(1, dtype=torch.float64).numpy()
            for t in (weight, back - weight)
        )
        fold = np.arange(len(own)) % FOLDS
        power += np.stack([np.bincount(fold, own, FOLDS), np.bincount(fold, off, FOLDS)], 1)
    whole = decibel(power.sum(0))
    left = [decibel(power.sum(0) - part) for part in power]
    return (
        bits / total,
        whole,
        math.sqrt((FOLDS - 1) / FOLDS * sum((v - sum(left) / FOLDS) ** 2 for v in left)),
    )


def decibel(power: Any) -> float:
    return float(10 * math.log10(power[0] / max(power[1], 1e-300)))


def baseline(points: list[tuple[float, float]], bits: float) -> float:
    """dB at `bits` on the upper line through (stored bits, dB) of asymmetric integers."""
    points = sorted(points)
    best: list[tuple[float, float]] = []
    for point in points:  # what costs more and gives less is no point of the line
        if not best or point[1] > best[-1][1]:
            best.append(point)
    if bits <= best[0][0]:
        return best[0][1] + 6.02 * (bits - best[0][0])
    for (a, low), (b, high) in itertools.pairwise(best):
        if bits <= b:
            return low + (high - low) * (bits - a) / (b - a)
    return best[-1][1] + 6.02 * (bits - best[-1][0])


def measured(data: str, options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """scheme -> (stored bits, dB, its error) on one set of weights; what an earlier call with as
    many rows found is not measured again.
    """
    path = options.folder / f"formats-{data}-{options.rows}.json"
    found = (
        {k: tuple(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
        if path.exists()
        else {}
    )
    layers = weights(data, options.rows)
    wanted = [s for s in options.schemes if not (options.plain and "@" in s)]
    for text in dict.fromkeys(
        [*wanted, *(s for s in schemes() if s.startswith("uint") and "@" not in s)]
    ):
        if text not in found:
            found[text] = noise(layers, Scheme.parse(text))
            path.write_text(json.dumps(found), encoding="utf-8")
            print(
                f"{data}  {text:16} {found[text][0]:.3f} bits  {found[text][1]:.2f} dB", flush=True
            )
    return found


def compare(options: argparse.Namespace) -> None:
    """SQNR of every scheme on every set of weights."""
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for data in options.data:
        found = measured(data, options)
        line = [
            (bits, level)
            for text, (bits, level, _) in found.items()
            if text.startswith("uint") and "@" not in text
        ]
        for text, (bits, level, error) in found.items():
            rows.append(
                {
                    "weights": data,
                    "scheme": text,
                    "bits": bits,
                    "dB": level,
                    "± dB": error,
                    "over uint": level - baseline(line, bits),
                }
            )
    rows.sort(key=lambda row: (row["weights"], row["bits"]))
    publish(
        __file__,
        rows,
        title="formats: dB of weights over their rounding noise, at stored bits",
        seed=0,
    )


def main() -> None:
    """Compare formats."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--data", nargs="+", default=["gauss", "student", "scenes-dit", "scenes-unet"]
    )
    parser.add_argument("--schemes", nargs="+", default=schemes())
    parser.add_argument("--plain", action="store_true", help="min-max and k-means alone")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/formats"),
        help="keeps what is measured, for a call that goes on",
    )
    options = parser.parse_args()
    compare(options)


if __name__ == "__main__":
    main()
