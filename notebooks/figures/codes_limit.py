"""How near each weight format comes to the rate-distortion limit, at the bits that it really
stores.

    python notebooks/figures/codes_limit.py [--data gauss student scenes-dit scenes-unet] [--rows
    512] python notebooks/figures/codes_limit.py --draw

dB of signal over noise of the weights, no data from calibration: Gaussian and Student-t (5 degrees
of freedom) rows of 1152 columns, and all layers of the zoo's denoisers together, their noise added
up. `limit` is 6.02 dB a bit, which no quantizer of independent Gaussian numbers passes; `below`:
how far a format lies under it. `~rotate`: each layer's input channels rotated in the largest group
that divides them. A layer with fewer rows or columns than a tile takes int8-c instead of a trellis.
Standard errors are over eight parts of the data. Writes codes_limit.json and codes_limit.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figure import publish
from formats import FOLDS, decibel, weights
from torch import Tensor

from qsearch.choices.block_scales import chosen
from qsearch.choices.formats.trellis import LEAST_ROWS
from qsearch.choices.quantization import quantize, to_groups
from qsearch.choices.trellis import trellis_codes
from qsearch.core.scheme import Scheme
from qsearch_kernels import trellis
from qsearch_kernels.hadamard import group_of, rotate_columns

Quantizer = Callable[[Tensor], tuple[Tensor, float]]
SCALAR = (
    *(
        f"{kind}{bits}{grain}"
        for kind in ("int", "uint") for bits in (2, 3, 4, 5, 6) for grain in ("-c", "-g64", "-g32")
    ),
    "e2m1-c", "e2m1-g32", "e2m1-g16", "km2-c", "km3-c", "km4-c", "mxfp4", "mxfp6", "nvfp4",
    "cb4",
)  # fmt: skip


def formats() -> Iterator[tuple[str, str, Quantizer]]:
    """(name, family, what makes values and stored bits of a weight [rows, columns])."""
    for name in SCALAR:
        yield name, _family(name), partial(_scheme, scheme=Scheme.parse(name))
    for name in ("nvfp4", "mxfp4"):
        yield f"{name}, 4 over 6", "blocks", partial(_chosen, scheme=Scheme.parse(name))
    for states in trellis.STATES:
        for bits in trellis.BITS:
            yield f"tcq{bits} 2^{states}", "trellis", partial(_trellis, bits=bits, states=states)


def _family(name: str) -> str:
    if name.startswith(("int", "uint")):
        return "integers"
    return "codebooks" if name.startswith("km") else "blocks"


def _scheme(weight: Tensor, scheme: Scheme) -> tuple[Tensor, float]:
    made = quantize(weight, scheme).dequantize()
    return made, scheme.stored_bits(weight.shape)


def _chosen(weight: Tensor, scheme: Scheme) -> tuple[Tensor, float]:
    made = chosen(to_groups(weight, scheme), scheme).values()
    values = made.reshape(len(weight), -1)[:, : weight.shape[1]]
    return values, scheme.stored_bits(weight.shape)


def _trellis(weight: Tensor, bits: int, states: int) -> tuple[Tensor, float]:
    if weight.shape[0] < LEAST_ROWS or weight.shape[1] < trellis.COLUMNS:
        return _scheme(weight, Scheme.parse("int8-c"))
    codes = trellis_codes(weight, bits, states)
    return codes.values(), codes.stored_bits


def rotated(weight: Tensor) -> Tensor:
    """A weight whose input channels are rotated, as rows; as it is where no group divides them."""
    try:
        group = group_of(weight.shape[1])
    except ValueError:
        return weight.flatten(1)
    return rotate_columns(weight.flatten(1), group, weight[0, 0].numel())


def measured(data: str, rows: int, turned: bool) -> Iterator[dict[str, Any]]:
    """One row a format."""
    layers = [rotated(w) if turned else w.flatten(1).float() for _, w, _ in weights(data, rows)]
    count = sum(w.numel() for w in layers)
    few = count > 10**6  # a trellis of 2**14 states takes a minute for a million weights
    for name, family, make in formats():
        if (turned and family == "codebooks") or (few and ("2^8" in name or "2^14" in name)):
            continue
        power, stored = np.zeros((FOLDS, 2)), 0.0
        for weight in layers:
            values, bits = make(weight)
            stored += bits
            off = values - weight
            own, wrong = (t.square().sum(1, dtype=torch.float64).numpy() for t in (weight, off))
            fold = np.arange(len(own)) % FOLDS
            power += np.stack([np.bincount(fold, p, FOLDS) for p in (own, wrong)], 1)
        whole, each = decibel(power.sum(0)), stored / count
        left = [decibel(power.sum(0) - part) for part in power]
        mean = sum(left) / FOLDS
        error = math.sqrt((FOLDS - 1) / FOLDS * sum((v - mean) ** 2 for v in left))
        yield {
            "data": data + ("~rotate" if turned else ""), "format": name, "family": family,
            "stored bits": each, "dB": whole, "±": error, "limit": 6.0206 * each,
            "below": 6.0206 * each - whole,
        }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel a set of weights: dB over stored bits, the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(row["data"] for row in rows))
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(5.2 * across, 4.4 * down), squeeze=False, layout="constrained"
    )
    looks = {
        "integers": ("o", "tab:blue"), "blocks": ("s", "tab:green"),
        "codebooks": ("^", "tab:purple"), "trellis": ("D", "tab:red"),
    }  # fmt: skip
    for axis, panel in zip(axes.flat, panels, strict=False):
        ends = [1.9, 5.2]
        axis.plot(ends, [6.0206 * b for b in ends], color="black", label="6.02 dB a bit")
        for family, (marker, colour) in looks.items():
            own = [r for r in rows if r["data"] == panel and r["family"] == family]
            own = [r for r in own if ends[0] <= r["stored bits"] <= ends[1] and r["dB"] > 0]
            bits, level = [r["stored bits"] for r in own], [r["dB"] for r in own]
            axis.scatter(bits, level, s=18, c=colour, marker=marker, label=family, alpha=0.8)
        for row in rows:
            if row["data"] == panel and row["format"] in ("nvfp4, 4 over 6", "cb4", "mxfp4"):
                axis.annotate(
                    row["format"], (row["stored bits"], row["dB"]), (6, -10),
                    textcoords="offset points", fontsize=7,
                )  # fmt: skip
        axis.set_title(panel)
        axis.set_xlabel("stored bits a weight")
        axis.set_ylabel("signal over noise of the weights, dB")
        axis.set_xlim(*ends)
        axis.set_ylim(2, 31)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, publish and draw."""
    parser = argparse.ArgumentParser()
    known = ["gauss", "student", "scenes-dit", "scenes-unet"]
    parser.add_argument("--data", nargs="+", default=known, choices=known)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--draw", action="store_true", help="only draw what codes_limit.json has")
    options = parser.parse_args()
    path = Path(__file__).with_suffix(".json")
    if options.draw:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    else:
        rows = []
        for data in options.data:
            for turned in (False, True) if data != "gauss" else (False,):
                for row in measured(data, options.rows, turned):
                    rows.append(row)
                    print(row, flush=True)
        publish(__file__, rows, title="dB of each weight format below 6.02 dB a bit", seed=0)
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
